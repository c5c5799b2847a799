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
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.architecture import TensorSpec, inventory, padded_width
from dots1_local.calibrate.backward import backward_layer, generator, head_gradients
from dots1_local.calibrate.column_sums import ColumnSums
from dots1_local.calibrate.hooks import observe_all
from dots1_local.calibrate.output_errors import REFERENCE, measure, read_rows, sample
from dots1_local.calibrate.probe_files import ProbeFiles
from dots1_local.calibrate.refined_effects import MeasuredEffects, RefinedRatios
from dots1_local.calibrate.refinement_probe import RefinementProbe
from dots1_local.calibrate.stream import Report, observe_head
from dots1_local.calibrate.weighted_errors import WeightedErrors
from dots1_local.errors import Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.hub.pass_shards import EMBEDDING, HEAD, Provide, layer_step, on_disk
from dots1_local.progress import Progress
from dots1_local.quant.importance import Importance, fill_gaps
from dots1_local.quant.sensitivity import Effect, Sensitivity, geometry
from dots1_local.quant.stock import is_quantisable
from dots1_local.reference.model import Compute

__all__ = ["BACKWARD_WORK", "BLOCKS", "DRAWS", "Probe", "activation_errors"]

BACKWARD_WORK = 10  # time of a token in the backward pass, relative to the forward pass
BLOCKS = (32, 256)  # activations that are rounded with one scale
DRAWS = 2  # of gradients, of each kind
_LEVELS = 127

Floats = NDArray[np.floating]
Found = dict[str, dict[str, Effect]]


@dataclass(frozen=True)
class Probe:
    """What the backward pass works on.

    `frequencies` (vocabulary,) are those of the tokens in the whole calibration text. `refinement`
    also measures what refined rows change. `provide` is called before a step is read.
    """

    checkpoint: Checkpoint
    files: ProbeFiles
    importance: Importance
    frequencies: Floats
    compute: Compute
    threads: int | None = None
    refinement: RefinementProbe | None = None
    provide: Provide = on_disk

    def run(
        self, output: Tensor, reference_kl: float, progress: Progress
    ) -> tuple[Sensitivity, Sensitivity | None]:
        """Measure every tensor, resuming after the last layer that an earlier run finished.

        The second result is the sensitivity of refined rows, if `refinement` is given.
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
        found, refined = self.files.effects(layers), None
        if self.refinement is not None:
            refined = self.files.effects(layers, refined=True)
        return self._sensitivities(found, refined, tokens, reference_kl)

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
        head = next(spec for spec in self._specs(None) if spec.role == "head")
        found = _Found(self.refinement.head() if self.refinement else None)
        weighted = found.weighted.observe, found.weighted.observe_squares
        kl_draws, rows = head_gradients(output, self.checkpoint, DRAWS, random, device, *weighted)
        g = torch.cat([kl_draws, torch.zeros_like(kl_draws)])
        row_costs = torch.stack([rows, torch.zeros_like(rows)])[:, None] / output[..., 0].numel()
        noise = ColumnSums(self.checkpoint.config, None, activation_errors)
        observe_head(output, self.checkpoint, noise.observe, device)
        moments, errors = self._second_moments(head), noise.means()[head.name]
        self._measure(found, head, row_costs.numpy(), moments, errors)
        found.save(self.files, layers, g)
        return layers, g

    def _layer(self, layer: int, g: Tensor, tokens: int, report: Report) -> None:
        inputs = torch.from_numpy(self.files.inputs(layer, g.shape[1:])).to(g.device)
        noise = ColumnSums(self.checkpoint.config, layer, activation_errors)
        found = _Found(None)
        if self.refinement is not None:
            kl, tie = g.cpu().numpy().reshape(2, DRAWS, -1, g.shape[-1])
            found.ratios = self.refinement.layer(layer, kl, tie)
        sigma, random, weighted = self.files.noise(layer), generator(0, layer), found.weighted
        sums, _ = backward_layer(
            g, inputs, self.checkpoint, layer, DRAWS, sigma, random, self.compute, report,
            observe_all(noise.observe, weighted.observe), weighted.observe_squares,
        )  # fmt: skip
        specs, errors = list(self._specs(layer)), noise.means()
        prefix = f"model.layers.{layer}."
        for spec in specs:
            by_expert = [sums[source.removeprefix(prefix)] / tokens for source in spec.sources]
            row_costs = torch.stack(by_expert, dim=1).numpy()
            moments = self._second_moments(spec)
            self._measure(found, spec, row_costs, moments, errors[spec.name])
            report(tokens / len(specs))
        if layer == 0:
            self.provide(EMBEDDING, partial(report, 0))
            embedding = next(spec for spec in self._specs(None) if spec.role == "embedding")
            self._embedding(found, embedding, g)
        found.save(self.files, layer, g)

    def _embedding(self, found: "_Found", spec: TensorSpec, g: Tensor) -> None:
        """The cost of a row is its token's frequency; that of a column is the mean square of the
        gradients there."""
        if self.refinement is not None:
            gradients = g[:DRAWS].cpu().numpy()
            found.ratios = self.refinement.embedding(spec, gradients)
        squares = g.square().unflatten(0, (2, DRAWS))
        by_kind = squares.mean(dim=(1, 2, 3), dtype=torch.float64)
        row_costs = np.broadcast_to(self.frequencies, (2, 1, len(self.frequencies)))
        self._measure(found, spec, row_costs, by_kind[:, None].cpu().numpy())

    def _measure(
        self,
        found: "_Found",
        spec: TensorSpec,
        row_costs: Floats,
        column_costs: Floats,
        input_errors: NDArray[np.float32] | None = None,
    ) -> None:
        """Add the effects of each type on a tensor and its inputs, and of `REFERENCE` on the
        tensor."""

        def rows_of(expert: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
            return read_rows(self.checkpoint, spec.sources[expert], rows)

        drawn = sample(spec, rows_of, row_costs, column_costs)
        squares = self.importance.get(spec.name)
        importance = fill_gaps(squares) if squares is not None and squares.any() else None
        effects, reference = measure(drawn, importance, self.threads)
        of_inputs = {}
        if input_errors is not None:
            of_inputs = dict(zip(BLOCKS, drawn.of_inputs(input_errors).tolist(), strict=True))
        found.add(spec, MeasuredEffects(effects, of_inputs), reference, row_costs)

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

    def _sensitivities(
        self, found: Found, refined: Found | None, tokens: int, reference_kl: float
    ) -> tuple[Sensitivity, Sensitivity | None]:
        """Scale the flips so that the prediction for `REFERENCE` equals the measured value."""
        reference = [by_type.pop(REFERENCE) for by_type in found.values()]
        damage = sum(effect.damage for effect in reference)
        flips = sum(effect.flips for effect in reference)
        scale = max(0.0, reference_kl - damage) ** 2 / flips if flips > 0 else 0.0

        def sensitivity(effects: Found) -> Sensitivity:
            scaled = {
                name: {kind: replace(e, flips=e.flips * scale) for kind, e in by_type.items()}
                for name, by_type in effects.items()
            }
            shape, sha256 = geometry(self.checkpoint.config), self.importance.sha256
            return Sensitivity(shape, sha256, tokens, REFERENCE, reference_kl, damage, scaled)

        return sensitivity(found), None if refined is None else sensitivity(refined)


@dataclass
class _Found:
    """The effects of a layer's tensors, and those of refined rows if their `ratios` are known."""

    ratios: RefinedRatios | None
    effects: Found = field(default_factory=dict)
    refined: Found = field(default_factory=dict)

    @property
    def weighted(self) -> WeightedErrors:
        return WeightedErrors({}) if self.ratios is None else self.ratios.weighted

    def add(
        self, spec: TensorSpec, measured: MeasuredEffects, reference: Effect, row_costs: Floats
    ) -> None:
        self.effects[spec.name] = {**measured.total(), REFERENCE: reference}
        if self.ratios is not None:
            self.refined[spec.name] = measured.total(self.ratios.of(spec, row_costs))

    def save(self, files: ProbeFiles, layer: int, g: Tensor) -> None:
        refined = None if self.ratios is None else self.refined
        files.save_backward(layer, g.cpu().numpy(), self.effects, refined)


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
