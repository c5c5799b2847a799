"""The effects of each type with the refined encoder, from those of ggml's own.

Damage and flips of a tensor's weights are multiplied by the ratio of refined errors to ggml's, by
what refined errors cost where they occur, and for matrices that write to the residual stream by
what their outputs' metric gains. What rounded activations cost stays as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import TensorSpec
from dots1_local.calibrate.output_gain import OutputGain
from dots1_local.calibrate.refined_errors import RefinedErrors
from dots1_local.calibrate.weighted_errors import WeightedErrors
from dots1_local.ggml import TYPES
from dots1_local.quant.sensitivity import Effect

__all__ = ["MeasuredEffects", "RefinedRatios"]

Floats = NDArray[np.floating]
Pair = tuple[float, float]


@dataclass(frozen=True)
class MeasuredEffects:
    """The effects of one tensor's types through its weights, and those of rounded inputs.

    `of_inputs` are damage and flips, by the size of a type's blocks.
    """

    of_weights: Mapping[str, Effect]
    of_inputs: Mapping[int, Pair] = field(default_factory=dict)

    def total(self, ratios: Mapping[str, Pair] | None = None) -> dict[str, Effect]:
        """Both together; `ratios` are the factors of damage and flips by type, by default 1."""
        totals = {}
        for kind, effect in self.of_weights.items():
            damage, flips = (ratios or {}).get(kind, (1.0, 1.0))
            inputs = self.of_inputs.get(TYPES[kind].block, (0.0, 0.0))
            totals[kind] = Effect(
                effect.error * damage,
                effect.damage * damage + inputs[0],
                effect.flips * flips + inputs[1],
            )
        return totals


@dataclass(frozen=True)
class RefinedRatios:
    """What refinement does in one layer: the errors of sampled rows, these errors weighted by
    gradients once the backward pass has been through the layer, and the outputs' gain."""

    errors: Mapping[str, RefinedErrors]
    weighted: WeightedErrors = field(default_factory=lambda: WeightedErrors({}))
    gain: OutputGain = field(default_factory=lambda: OutputGain({}))

    def of(self, spec: TensorSpec, row_costs: Floats) -> dict[str, Pair]:
        """Factors of damage and flips by type, if rows cost `row_costs` (2, experts, rows)."""
        if spec.name not in self.errors:
            return {}
        ratios = self.errors[spec.name].ratios(row_costs[0].sum(axis=-1))
        factors = self.weighted.factors(spec)
        gain = self.gain if spec.adds_to_residual else OutputGain({})
        return {
            kind: (ratio * factors[0] * gains[0], ratio * factors[1] * gains[1])
            for kind, ratio in ratios.items()
            for gains in [gain.of(TYPES[kind])]
        }
