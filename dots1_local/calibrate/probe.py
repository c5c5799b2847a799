"""The backward pass over the checkpoint, which measures sensitivity.

The forward pass has saved the inputs of each layer for a few chunks of the calibration text. From
the last layer to the first, gradients of KL divergence give the cost of an error at each matrix's
output, and sampled rows give the errors of each type. Memory holds the head in F32 (2.5 GB for
dots.llm1, and 1.2 GB more while it is read), later the part of a layer that all tokens use; and
about ten arrays of the size of the probed chunks' residual stream (34 MB each).

llama.cpp also loses precision because its CPU kernels round activations to 8 bits before they
multiply them by quantised weights. They do this in blocks with a common scale: of 32 for types
whose own blocks have 32 weights, and of 256 for the other types. This counts as an effect too.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.architecture import TensorSpec, inventory, padded_width
from dots1_local.calibrate.backward import backward_layer, generator, head_gradients
from dots1_local.calibrate.column_sums import ColumnSums
from dots1_local.calibrate.output_errors import REFERENCE, measure, read_rows, sample
from dots1_local.calibrate.probe_files import ProbeFiles
from dots1_local.calibrate.refinement_file import RefinementWriter
from dots1_local.calibrate.stream import Report, observe_head
from dots1_local.errors import Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.ggml import TYPES
from dots1_local.hub.pass_shards import EMBEDDING, HEAD, Provide, layer_step, on_disk
from dots1_local.progress import Progress
from dots1_local.quant.importance import Importance
from dots1_local.quant.sensitivity import Effect, Sensitivity, geometry
from dots1_local.quant.stock import is_quantisable
from dots1_local.reference.layers import rms_norm
from dots1_local.reference.model import Compute, Rounding, head_name, read_tensor

__all__ = ["BACKWARD_WORK", "BLOCKS", "DRAWS", "Probe", "activation_errors", "rounded_divergence"]

BACKWARD_WORK = 10  # time of a token in the backward pass, relative to the forward pass
BLOCKS = (32, 256)  # activations that are rounded with one scale
DRAWS = 2  # of gradients, of each kind
_LEVELS = 127
_VOCABULARY = 8192  # rows of the head that are rounded at a time
_ROWS = 1024  # positions; with as many rows of the head, 67 MB in F64

Floats = NDArray[np.floating]
Found = dict[str, dict[str, Effect]]


@dataclass(frozen=True)
class Probe:
    """What the backward pass works on.

    `frequencies` (vocabulary,) are those of the tokens in the whole calibration text. `refinement`
    gets the second moments of the gradients. `provide` is called before a step is read.
    """

    checkpoint: Checkpoint
    files: ProbeFiles
    importance: Importance
    frequencies: Floats
    compute: Compute
    threads: int | None = None
    refinement: RefinementWriter | None = None
    provide: Provide = on_disk

    def run(self, output: Tensor, reference_kl: float, progress: Progress) -> Sensitivity:
        """Measure every tensor, resuming after the last layer that an earlier run finished.

        `output` [chunks, positions, hidden] is the output of the last layer; `reference_kl` is the
        KL divergence, in nats a token, of the model with all matrices stored as `REFERENCE`.

        Raises:
            CheckpointError: a tensor is missing or unreadable, or a gradient is NaN or infinite.
            Dots1Error: a file of the earlier run is damaged.
            OSError: the disk is full or broken.
        """
        layers, tokens = self.checkpoint.config.num_hidden_layers, output[..., 0].numel()
        total = BACKWARD_WORK * tokens
        progress(0, total, "tokens", "head")
        reached, g = self._start(output, partial(progress, 0, total, "tokens"))
        for layer in range(reached - 1, -1, -1):
            done = float(tokens * (layers - 1 - layer))

            def report(work: float, name: str = f"layer {layer}, backward") -> None:
                nonlocal done
                done += work / 2  # gradients take about as long as sampled rows
                progress(round(BACKWARD_WORK * done / layers), total, "tokens", name)

            self.provide(layer_step(layer), partial(report, 0))
            report(0)
            self._layer(layer, g, tokens, report)
        return self._sensitivity(self.files.effects(layers), tokens, reference_kl)

    def _start(self, output: Tensor, notify: Callable[[str], None]) -> tuple[int, Tensor]:
        """The last layer that is finished, and the gradients at its input; the head counts as the
        layer after the last one."""
        layers = self.checkpoint.config.num_hidden_layers
        reached = self.files.reached(layers)
        if reached is not None:
            saved = self.files.gradients(reached, (2 * DRAWS, *output.shape))
            return reached, torch.from_numpy(saved).to(output.device)
        self.provide(HEAD, notify)
        random, device = generator(0, layers), self.compute.device
        kl_draws, rows = head_gradients(output, self.checkpoint, DRAWS, random, device)
        g = torch.cat([kl_draws, torch.zeros_like(kl_draws)])
        row_costs = torch.stack([rows, torch.zeros_like(rows)])[:, None] / output[..., 0].numel()
        head = next(spec for spec in self._specs(None) if spec.role == "head")
        noise = ColumnSums(self.checkpoint.config, None, activation_errors)
        observe_head(output, self.checkpoint, noise.observe, device)
        moments, errors = self._second_moments(head), noise.means()[head.name]
        found = {head.name: self._effects(head, row_costs.numpy(), moments, errors)}
        self.files.save_backward(layers, g.cpu().numpy(), found)
        return layers, g

    def _layer(self, layer: int, g: Tensor, tokens: int, report: Report) -> None:
        inputs = torch.from_numpy(self.files.inputs(layer, g.shape[1:])).to(g.device)
        noise = ColumnSums(self.checkpoint.config, layer, activation_errors)
        if self.refinement is not None:
            self.refinement.put_outputs(layer, g[:DRAWS].cpu().numpy())
        sigma, random, observe = self.files.noise(layer), generator(0, layer), noise.observe
        sums, _ = backward_layer(
            g, inputs, self.checkpoint, layer, DRAWS, sigma, random, self.compute, report, observe
        )
        specs, found, errors = list(self._specs(layer)), {}, noise.means()
        prefix = f"model.layers.{layer}."
        for spec in specs:
            by_expert = [sums[source.removeprefix(prefix)] / tokens for source in spec.sources]
            row_costs = torch.stack(by_expert, dim=1).numpy()
            moments = self._second_moments(spec)
            found[spec.name] = self._effects(spec, row_costs, moments, errors[spec.name])
            report(tokens / len(specs))
        if layer == 0:
            self.provide(EMBEDDING, partial(report, 0))
            embedding = next(spec for spec in self._specs(None) if spec.role == "embedding")
            found[embedding.name] = self._embedding(embedding, g)
            if self.refinement is not None:
                self.refinement.put_embedding(g[:DRAWS].cpu().numpy())
        self.files.save_backward(layer, g.cpu().numpy(), found)

    def _embedding(self, spec: TensorSpec, g: Tensor) -> dict[str, Effect]:
        """The cost of a row is its token's frequency; that of a column is the mean square of the
        gradients there."""
        squares = g.square().unflatten(0, (2, DRAWS))
        by_kind = squares.mean(dim=(1, 2, 3), dtype=torch.float64)
        row_costs = np.broadcast_to(self.frequencies, (2, 1, len(self.frequencies)))
        return self._effects(spec, row_costs, by_kind[:, None].cpu().numpy())

    def _effects(
        self,
        spec: TensorSpec,
        row_costs: Floats,
        column_costs: Floats,
        input_errors: NDArray[np.float32] | None = None,
    ) -> dict[str, Effect]:
        """The effects of each type on a tensor and its inputs, and of `REFERENCE` on the tensor."""

        def rows_of(expert: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
            return read_rows(self.checkpoint, spec.sources[expert], rows)

        drawn = sample(spec, rows_of, row_costs, column_costs)
        effects, reference = measure(drawn, self.importance.get(spec.name), self.threads)
        if input_errors is not None:
            of_inputs = dict(zip(BLOCKS, drawn.of_inputs(input_errors).tolist(), strict=True))
            for kind, effect in effects.items():
                damage, flips = of_inputs[TYPES[kind].block]
                effects[kind] = Effect(effect.error, effect.damage + damage, effect.flips + flips)
        return {**effects, REFERENCE: reference}

    def _second_moments(self, spec: TensorSpec) -> Floats:
        """The mean squares of a matrix's inputs: (1, experts, columns)."""
        values = self.importance.get(spec.name)
        if values is None:
            raise Dots1Error(f"{self.importance.path} does not cover {spec.name}")
        return values[None]

    def _specs(self, layer: int | None) -> Iterable[TensorSpec]:
        """A layer's tensors that can be quantised, at the padded width."""
        config = self.checkpoint.config
        for spec in inventory(config, padded_width(config.moe_intermediate_size)):
            if spec.layer == layer and is_quantisable(spec):
                yield spec

    def _sensitivity(self, found: Found, tokens: int, reference_kl: float) -> Sensitivity:
        """Scale the flips so that the prediction for `REFERENCE` equals the measured value."""
        reference = [by_type.pop(REFERENCE) for by_type in found.values()]
        damage = sum(effect.damage for effect in reference)
        flips = sum(effect.flips for effect in reference)
        scale = max(0.0, reference_kl - damage) ** 2 / flips if flips > 0 else 0.0
        return Sensitivity(
            geometry(self.checkpoint.config),
            self.importance.sha256,
            tokens,
            REFERENCE,
            reference_kl,
            damage,
            {
                name: {kind: replace(e, flips=e.flips * scale) for kind, e in by_type.items()}
                for name, by_type in found.items()
            },
        )


def activation_errors(rows: Tensor) -> Tensor:
    """The squared errors of rounded activations, summed over rows, for each of `BLOCKS`:
    [2, columns]."""
    exact = rows.float()
    return torch.stack([(_rounded(exact, size) - exact).square().sum(0) for size in BLOCKS])


def _rounded(rows: Tensor, size: int) -> Tensor:
    columns = rows.shape[-1]
    blocks = F.pad(rows, (0, -columns % size)).unflatten(-1, (-1, size))
    scales = blocks.abs().amax(-1, keepdim=True) / _LEVELS
    rounded: Tensor = (blocks / scales.where(scales > 0, torch.ones_like(scales))).round_() * scales
    return rounded.flatten(-2)[..., :columns]


class _Divergence:
    """KL divergence of positions whose logits come in parts of the vocabulary."""

    def __init__(self, rows: int, device: torch.device) -> None:
        start = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
        self._lse_p, self._lse_q = start, start
        self._mean = torch.zeros_like(start)  # of the logits' difference, under p

    def add(self, p: Tensor, q: Tensor) -> None:
        """Add both models' logits [rows, part of the vocabulary]."""
        p, q = p.double(), q.double()
        lse = self._lse_p.logaddexp(p.logsumexp(-1))
        part = ((p - lse[:, None]).exp() * (p - q)).sum(-1)
        self._mean = self._mean * (self._lse_p - lse).exp() + part
        self._lse_p, self._lse_q = lse, self._lse_q.logaddexp(q.logsumexp(-1))

    def total(self) -> float:
        """The sum over all positions, in nats."""
        return float((self._mean - self._lse_p + self._lse_q).sum())


@torch.no_grad()
def rounded_divergence(
    exact: Tensor, rounded: Tensor, checkpoint: Checkpoint, rounding: Rounding, device: torch.device
) -> float:
    """Mean KL divergence, in nats, of the rounded model from the exact one, over all positions.

    `exact` and `rounded` [chunks, positions, hidden] are the outputs of their last layers. The head
    is rounded too; only a part of it is in memory as F32 at a time.

    Raises:
        CheckpointError: the head is missing or unreadable.
    """
    config = checkpoint.config
    norm = read_tensor(checkpoint, "model.norm.weight").to(device).float()
    blocks = [x.flatten(0, 1).split(_ROWS) for x in (exact, rounded)]
    sums = [_Divergence(len(block), device) for block in blocks[0]]

    def logits(block: Tensor, head: Tensor) -> Tensor:
        return F.linear(rms_norm(block.to(device), norm, config.rms_norm_eps), head)

    for rows in read_tensor(checkpoint, head_name(config)).split(_VOCABULARY):
        exact_rows, rounded_rows = rows.to(device).float(), rounding(rows).to(device).float()
        for divergence, p, q in zip(sums, *blocks, strict=True):
            divergence.add(logits(p, exact_rows), logits(q, rounded_rows))
    return sum(divergence.total() for divergence in sums) / exact[..., 0].numel()
