"""The way back through the checkpoint, on which sensitivity is measured.

A few chunks of the calibration text have left on disk what entered each layer. From the last layer
to the first, gradients of KL divergence say what an error at each matrix's output costs, and
sampled rows what errors each type makes. Memory holds the head once in F32 (2.5 GB of dots.llm1,
and 1.2 GB more while it is read), then what all tokens of a layer share; beside them some ten
copies of what the probed chunks have for a residual stream (34 MB each).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.architecture import TensorSpec, inventory, padded_width
from dots1_local.calibrate.backward import generator, retreat, top
from dots1_local.calibrate.output_errors import REFERENCE, measure, read_rows, sample
from dots1_local.calibrate.probe_folder import ProbeFolder
from dots1_local.calibrate.rounding import BLOCKS, ActivationNoise
from dots1_local.calibrate.stream import observe_head
from dots1_local.errors import Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.ggml import TYPES
from dots1_local.progress import Progress
from dots1_local.quant.importance import Importance
from dots1_local.quant.sensitivity import Effect, Sensitivity, geometry
from dots1_local.quant.stock import is_quantisable
from dots1_local.reference.weights import Kernel

__all__ = ["DRAWS", "WORTH", "Probe"]

DRAWS = 2  # of gradients, of either kind
WORTH = 10  # tokens on the way forward take the time that one takes on the way back

Floats = NDArray[np.floating]
Found = dict[str, dict[str, Effect]]


@dataclass(frozen=True)
class Probe:
    """What the way back works on. `frequencies` (vocabulary,) are the tokens' in the whole text."""

    checkpoint: Checkpoint
    folder: ProbeFolder
    importance: Importance
    frequencies: Floats
    kernel: Kernel
    threads: int | None = None

    def run(self, left: Tensor, reference_kl: float, progress: Progress) -> Sensitivity:
        """Measure every tensor, going on where a former run stopped.

        `left` [chunks, positions, hidden] is what left the last layer; `reference_kl` is the KL
        divergence, in nats a token, of the model whose matrices are all stored as `REFERENCE`.

        Raises:
            CheckpointError: a tensor is missing or unreadable, or a gradient is no number.
            Dots1Error: a file of the former run is damaged.
            OSError: the disk is full or broken.
        """
        config = self.checkpoint.config
        layers, tokens = config.num_hidden_layers, left.shape[0] * left.shape[1]
        progress(0, WORTH * tokens, "tokens", "head")
        reached, g = self._begin(left)
        for layer in range(reached - 1, -1, -1):
            done = float(tokens * (layers - 1 - layer))

            def step(amount: float, name: str = f"back in layer {layer}") -> None:
                nonlocal done
                done += amount / 2  # gradients take about as long as rows
                progress(round(WORTH * done / layers), WORTH * tokens, "tokens", name)

            step(0)
            self._layer(layer, g, tokens, step)
        return self._sum_up(self.folder.effects(layers), tokens, reference_kl)

    def _begin(self, left: Tensor) -> tuple[int, Tensor]:
        """The last layer dealt with, counting the head as one, and the gradients there."""
        layers = self.checkpoint.config.num_hidden_layers
        reached = self.folder.reached(layers)
        if reached is not None:
            former = self.folder.gradients(reached, (2 * DRAWS, *left.shape))
            return reached, torch.from_numpy(former).to(left.device)
        random = generator(0, layers)
        at_top, rows = top(left, self.checkpoint, DRAWS, random, self.kernel.device)
        g = torch.cat([at_top, torch.zeros_like(at_top)])
        row_costs = torch.stack([rows, torch.zeros_like(rows)])[:, None] / left[..., 0].numel()
        head = next(spec for spec in self._specs(None) if spec.role == "head")
        noise = ActivationNoise(self.checkpoint.config, None)
        observe_head(left, self.checkpoint, noise.observe, self.kernel.device)
        squares, errors = self._squares(head), noise.by_name()[head.name]
        found = {head.name: self._effects(head, row_costs.numpy(), squares, errors)}
        self.folder.keep_backward(layers, g.cpu().numpy(), found)
        return layers, g

    def _layer(self, layer: int, g: Tensor, tokens: int, step: Callable[[float], None]) -> None:
        entered = torch.from_numpy(self.folder.entered(layer, g.shape[1:])).to(g.device)
        noise = ActivationNoise(self.checkpoint.config, layer)
        sums, _ = retreat(
            g,
            entered,
            self.checkpoint,
            layer,
            DRAWS,
            self.folder.noise(layer),
            generator(0, layer),
            self.kernel,
            step,
            noise.observe,
        )
        specs, found, errors = list(self._specs(layer)), {}, noise.by_name()
        prefix = f"model.layers.{layer}."
        for spec in specs:
            by_expert = [sums[source.removeprefix(prefix)] / tokens for source in spec.sources]
            row_costs = torch.stack(by_expert, dim=1).numpy()
            squares = self._squares(spec)
            found[spec.name] = self._effects(spec, row_costs, squares, errors[spec.name])
            step(tokens / len(specs))
        if layer == 0:
            embedding = next(spec for spec in self._specs(None) if spec.role == "embedding")
            found[embedding.name] = self._embedding(embedding, g)
        self.folder.keep_backward(layer, g.cpu().numpy(), found)

    def _embedding(self, spec: TensorSpec, g: Tensor) -> dict[str, Effect]:
        """A token's row costs by how often it is looked up, its columns by the gradients there."""
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
        """What each type does to a tensor and its inputs, and what `REFERENCE` does to it."""

        def rows_of(expert: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
            return read_rows(self.checkpoint, spec.sources[expert], rows)

        drawn = sample(spec, rows_of, row_costs, column_costs)
        effects, reference = measure(drawn, self.importance.get(spec.name), self.threads)
        if input_errors is not None:
            of_inputs = dict(zip(BLOCKS, drawn.of_inputs(input_errors).tolist(), strict=True))
            effects = {k: _more(e, *of_inputs[TYPES[k].block]) for k, e in effects.items()}
        return {**effects, REFERENCE: reference}

    def _squares(self, spec: TensorSpec) -> Floats:
        """Mean squares of what a matrix is multiplied by: (1, experts, columns)."""
        values = self.importance.get(spec.name)
        if values is None:
            raise Dots1Error(f"{self.importance.path} has nothing about {spec.name}")
        return values[None]

    def _specs(self, layer: int | None) -> Iterable[TensorSpec]:
        """A layer's tensors that may be quantised, at the padded width."""
        config = self.checkpoint.config
        for spec in inventory(config, padded_width(config.moe_intermediate_size)):
            if spec.layer == layer and is_quantisable(spec):
                yield spec

    def _sum_up(self, found: Found, tokens: int, reference_kl: float) -> Sensitivity:
        """Scale the flips so that the reference comes out at what it was measured at."""
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
                name: {
                    kind: Effect(effect.error, effect.damage, effect.flips * scale)
                    for kind, effect in by_type.items()
                }
                for name, by_type in found.items()
            },
        )


def _more(effect: Effect, damage: float, flips: float) -> Effect:
    return Effect(effect.error, effect.damage + damage, effect.flips + flips)
