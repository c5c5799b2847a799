"""What every tensor of a model can be stored as: bytes, damage and flips of each possibility.

The best change of one or two choices at once, among all there are.
"""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import Dots1Config, TensorSpec, inventory
from dots1_local.errors import Dots1Error
from dots1_local.ggml import TYPES
from dots1_local.quant.plan import Override, PlannedTensor, overridden
from dots1_local.quant.sensitivity import Effect, Sensitivity
from dots1_local.quant.stock import fallback, is_quantisable, needs_importance

__all__ = [
    "KINDS",
    "Choice",
    "Choices",
    "Cost",
    "Floats",
    "best_change",
    "choices_at",
]


Floats = NDArray[np.float64]
Choice = NDArray[np.intp]  # of each tensor, the index into KINDS
Cost = Callable[[PlannedTensor], float]

# Small ones first: between types that do equal damage, the first is taken.
KINDS = tuple(sorted(TYPES, key=lambda name: TYPES[name].bpw))
_EXACT = Effect(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Choices:
    """The possibilities at one expert width.

    Matrices are (tensors, types) in the order of `specs` and `KINDS`, infinite where a type is out
    of question. `fixed_bytes` is what tensors without a choice take.
    """

    width: int
    specs: tuple[TensorSpec, ...]
    nbytes: Floats
    damage: Floats
    flips: Floats
    fixed_bytes: float

    def size(self, choice: Choice) -> float:
        """Bytes of all tensors."""
        return self.fixed_bytes + float(_chosen(self.nbytes, choice).sum())

    def kl(self, choice: Choice) -> float:
        """Predicted KL divergence, in nats a token."""
        flips = float(_chosen(self.flips, choice).sum())
        return float(_chosen(self.damage, choice).sum()) + math.sqrt(flips)

    def tangent(self, choice: Choice) -> Floats:
        """KL divergence made additive: the root of the flips replaced by its tangent at `choice`.

        A root lies below its tangents, so what lowers this sum lowers the divergence at least so
        much.
        """
        flips = float(_chosen(self.flips, choice).sum())
        # Where nothing flips yet the first flip costs without bound.
        return self.damage + self.flips * (0.5 / math.sqrt(max(flips, 1e-30)))

    def shares(self, choice: Choice) -> Floats:
        """What each tensor adds to the predicted KL divergence, in nats; they sum up to it."""
        flips = _chosen(self.flips, choice)
        return _chosen(self.damage, choice) + flips / math.sqrt(max(float(flips.sum()), 1e-30))

    def smallest(self) -> Choice:
        """The fewest bytes there can be."""
        choice: Choice = self.nbytes.argmin(axis=1)
        return choice

    def best(self) -> Choice:
        """The least damage there can be, in as few bytes as that takes."""
        choice: Choice = self.tangent(self.damage.argmin(axis=1)).argmin(axis=1)
        return choice

    def types(self, choice: Choice) -> dict[str, str]:
        """Type by tensor name."""
        return {s.name: KINDS[kind] for s, kind in zip(self.specs, choice, strict=True)}


def choices_at(
    width: int,
    config: Dots1Config,
    sensitivity: Sensitivity,
    *,
    covered: Container[str],
    overrides: Sequence[Override],
    cost: Cost,
) -> Choices:
    """The possibilities at one expert width: types that were measured, fit, and bear being used.

    `covered` holds the tensors that importance is there for. An override leaves one possibility.

    Raises:
        Dots1Error: nothing was measured of a tensor, or not the type it is to have.
    """
    specs = inventory(config, width)
    free = tuple(spec for spec in specs if is_quantisable(spec))
    nbytes, damage, flips = (np.full((len(free), len(KINDS)), np.inf) for _ in range(3))
    for row, spec in enumerate(free):
        effects = _effects(spec, sensitivity, covered, overrides)
        for kind, effect in effects.items():
            place = row, KINDS.index(kind)
            nbytes[place] = cost(PlannedTensor(spec, TYPES[kind]))
            damage[place], flips[place] = effect.damage, effect.flips
    fixed = [PlannedTensor(spec, TYPES["F32"]) for spec in specs if not is_quantisable(spec)]
    return Choices(width, free, nbytes, damage, flips, sum(map(cost, fixed)))


def _effects(
    spec: TensorSpec,
    sensitivity: Sensitivity,
    covered: Container[str],
    overrides: Sequence[Override],
) -> Mapping[str, Effect]:
    measured = sensitivity.tensors.get(spec.name, {})
    override = overridden(spec.name, overrides)
    if override is not None:
        kind = fallback(override, spec.columns)
        if kind not in measured and TYPES[kind].bpw < 16:
            raise Dots1Error(
                f"what {kind} does to {spec.name} was not measured, which a budget needs; "
                f"--tensor-type may give it {', '.join([*measured, 'BF16', 'F16', 'F32'])}"
            )
        return {kind: measured.get(kind, _EXACT)}
    possible = {
        kind: effect
        for kind, effect in measured.items()
        if TYPES[kind].fits(spec.columns)
        and (spec.name in covered or not needs_importance(spec.name, kind))
    }
    if not possible:
        raise Dots1Error(
            f"the sensitivity file has no type for {spec.name} (rows of {spec.columns}); "
            "calibrate again"
        )
    return possible


def _chosen(matrix: Floats, choice: Choice) -> Floats:
    values: Floats = np.take_along_axis(matrix, choice[:, None], axis=1)[:, 0]
    return values


Places = NDArray[np.intp]


def best_change(
    cost: Floats, loss: Floats, slack: float, least: float
) -> tuple[tuple[int, int], ...]:
    """The change of one tensor, or of two, that lowers the loss most and costs at most `slack`.

    `cost` and `loss` are (tensors, types), relative to the choice so far. Returns (tensor, type)
    pairs: none if nothing lowers the loss by more than `least`.
    """
    kinds = cost.shape[1]
    costs, losses = cost.ravel(), loss.ravel()
    taking = np.flatnonzero(np.isfinite(costs) & np.isfinite(losses))
    taking = taking[np.argsort(costs[taking], kind="stable")]
    if not taking.size:
        return ()
    # A single change is one that no other pays for: the first giver gives nothing.
    giving = np.flatnonzero((costs < 0) & np.isfinite(losses))
    room = np.append(0.0, -costs[giving]) + slack
    given = np.append(0.0, losses[giving])
    owner = np.append(-1, giving // kinds)
    last = np.searchsorted(costs[taking], room, side="right") - 1
    first, second = _two_lowest(losses[taking], taking // kinds)
    partner = np.where(taking[first[last]] // kinds == owner, second[last], first[last])
    possible = (last >= 0) & (partner >= 0)
    total = np.where(possible, given + losses[taking[partner]], np.inf)
    pair = int(total.argmin())
    if not total[pair] < -least:
        return ()
    moves = [int(taking[partner[pair]])] + ([int(giving[pair - 1])] if pair else [])
    return tuple(divmod(move, kinds) for move in moves)


def _two_lowest(values: Floats, owners: Places) -> tuple[Places, Places]:
    """Up to each place, where the lowest value is, and the lowest of another owner (-1: none)."""
    first = _lowest(values)
    led = owners[first]
    # Whoever loses the lead is the best of the others, and below all that the new leader had.
    rival = np.where(owners != led, values, np.inf)
    place = np.arange(len(values))
    overtaken = np.flatnonzero(led[1:] != led[:-1]) + 1
    rival[overtaken], place[overtaken] = values[first[overtaken - 1]], first[overtaken - 1]
    lowest = _lowest(rival)
    return first, np.where(np.isfinite(rival[lowest]), place[lowest], -1)


def _lowest(values: Floats) -> Places:
    """Up to each place, where the lowest value so far is first met."""
    before = np.append(np.inf, np.minimum.accumulate(values)[:-1])
    return np.maximum.accumulate(np.where(values < before, np.arange(len(values)), 0))
