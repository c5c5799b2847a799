"""The types that every tensor may have, and the bytes, damage and flips of each.

`best_change` finds the best change of one or two types among all possible ones.
"""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import Dots1Config, TensorSpec, inventory
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.ggml import TYPES
from dots1_local.quant.plan import Override, PlannedTensor, override_type
from dots1_local.quant.recipes import Padding, expert_widths
from dots1_local.quant.sensitivity import Effect, Sensitivity
from dots1_local.quant.stock import fallback, is_quantisable, needs_importance

__all__ = [
    "KINDS",
    "Change",
    "Choice",
    "Choices",
    "Cost",
    "Floats",
    "best_change",
    "choices_by_width",
]

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Choice = NDArray[np.intp]  # for each tensor, the index of its type in KINDS
Change = tuple[tuple[int, int], ...]  # tensors and the indices of their new types
Cost = Callable[[PlannedTensor], float]

# Small types first: of types with equal damage, the first is taken.
KINDS = tuple(sorted(TYPES, key=lambda name: TYPES[name].bpw))
_EXACT = Effect(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Choices:
    """The possible types at one expert width.

    Matrices are (tensors, types) in the order of `specs` and `KINDS`; they are infinite where a
    type is not possible. `fixed_bytes` is the size of the tensors that have only one type.

    In `merged` choices, a row stands for all tensors that must have one type, under a name with a
    `*` for the layer. `apart` are the choices before they were merged, and `row_of` is where each
    of their tensors is now.
    """

    width: int
    specs: tuple[TensorSpec, ...]
    nbytes: Floats
    damage: Floats
    flips: Floats
    fixed_bytes: float
    apart: "Choices | None" = None
    row_of: Indices | None = None

    def size(self, choice: Choice) -> float:
        """Bytes of all tensors."""
        return self.fixed_bytes + float(_chosen(self.nbytes, choice).sum())

    def kl(self, choice: Choice) -> float:
        """Predicted KL divergence, in nats a token."""
        flips = float(_chosen(self.flips, choice).sum())
        return float(_chosen(self.damage, choice).sum()) + math.sqrt(flips)

    def tangent(self, choice: Choice) -> Floats:
        """KL divergence made additive: the square root replaced by its tangent at `choice`.

        A square root lies below its tangents, so a choice that lowers this sum lowers the KL
        divergence by at least as much.
        """
        flips = float(_chosen(self.flips, choice).sum())
        # The slope at zero is infinite; this limits it.
        return self.damage + self.flips * (0.5 / math.sqrt(max(flips, 1e-30)))

    def shares(self, choice: Choice) -> Floats:
        """Each tensor's contribution to the predicted KL divergence, in nats; their sum is it."""
        flips = _chosen(self.flips, choice)
        return _chosen(self.damage, choice) + flips / math.sqrt(max(float(flips.sum()), 1e-30))

    def smallest(self) -> Choice:
        """The choice of fewest bytes."""
        choice: Choice = self.nbytes.argmin(axis=1)
        return choice

    def best(self) -> Choice:
        """The choice of least KL divergence, and of fewest bytes among equally good ones."""
        choice: Choice = self.tangent(self.damage.argmin(axis=1)).argmin(axis=1)
        return choice

    def types(self, choice: Choice) -> dict[str, str]:
        """Type by tensor name."""
        return {s.name: KINDS[kind] for s, kind in zip(self.specs, choice, strict=True)}

    def by_tensor(self, choice: Choice) -> "tuple[Choices, Choice]":
        """The choices before they were merged, and in them this choice."""
        return (self, choice) if self.apart is None else (self.apart, choice[self.row_of])

    def merged(self) -> "Choices":
        """The choices of models whose experts have one layout in all layers: each matrix (gate, up
        and down) has one type.

        Raises:
            UsageError: no type is possible in all layers.
        """
        names = [f"blk.*.{s.part}.weight" if s.role == "routed" else s.name for s in self.specs]
        first = {name: names.index(name) for name in names}
        row_of = np.array([list(first).index(name) for name in names])
        specs = tuple(replace(self.specs[at], name=name) for name, at in first.items())

        def summed(matrix: Floats) -> Floats:
            sums = np.zeros((len(specs), len(KINDS)))
            np.add.at(sums, row_of, matrix)
            return sums

        nbytes, damage, flips = map(summed, (self.nbytes, self.damage, self.flips))
        possible = np.isfinite(nbytes).any(1)
        if not possible.all():
            raise UsageError(
                f"no type is possible for {specs[int(possible.argmin())].name} in all layers, as "
                "--one-layout needs; leave it out, or the --tensor-type that gives layers others"
            )
        return Choices(
            self.width, specs, nbytes, damage, flips, self.fixed_bytes, apart=self, row_of=row_of
        )


def choices_by_width(
    config: Dots1Config,
    sensitivity: Sensitivity,
    *,
    covered: Container[str] | None = None,
    padding: Padding = "auto",
    overrides: Sequence[Override] = (),
    cost: Cost = attrgetter("nbytes"),
) -> list[Choices]:
    """The possible types at each expert width that `padding` allows: those that were measured and
    fit, and that do not need importance where there is none.

    `covered` holds the tensors with importance (None: all). `cost` gives a tensor's part of the
    budget, by default its bytes. An override leaves one possible type.

    Raises:
        Dots1Error: a tensor, or the type that it must have, was not measured; or the sensitivity is
            that of another model.
    """
    sensitivity.check(config)
    return [
        _choices_at(
            width,
            config,
            sensitivity,
            covered=sensitivity.tensors if covered is None else covered,
            overrides=overrides,
            cost=cost,
        )
        for width in expert_widths(config, padding)
    ]


def _choices_at(
    width: int,
    config: Dots1Config,
    sensitivity: Sensitivity,
    *,
    covered: Container[str],
    overrides: Sequence[Override],
    cost: Cost,
) -> Choices:
    """The choices at one expert width."""
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
    override = override_type(spec.name, overrides)
    if override is not None:
        kind = fallback(override, spec)
        if kind not in measured and TYPES[kind].bpw < 16:
            raise Dots1Error(
                f"the effect of {kind} on {spec.name} was not measured, so no budget can be kept "
                f"with it; --tensor-type may set {', '.join([*measured, 'BF16', 'F16', 'F32'])}"
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


def best_change(cost: Floats, loss: Floats, slack: float, least: float) -> Change:
    """The change of one tensor, or of two, that lowers the loss most and costs at most `slack`.

    `cost` and `loss` are (tensors, types), relative to the present choice. The change is empty if
    none lowers the loss by more than `least`.

    All single changes are sorted by cost. Every change that frees bytes is paired with the change
    of another tensor that has the lowest loss among those that the freed bytes pay for.
    """
    kinds = cost.shape[1]
    costs, losses = cost.ravel(), loss.ravel()
    changes = np.flatnonzero(np.isfinite(costs) & np.isfinite(losses))
    changes = changes[np.argsort(costs[changes], kind="stable")]
    if not changes.size:
        return ()
    # The first entry stands for no change: it makes the other change a single one.
    freeing = np.flatnonzero((costs < 0) & np.isfinite(losses))
    room = np.append(0.0, -costs[freeing]) + slack
    freed_loss = np.append(0.0, losses[freeing])
    tensor = np.append(-1, freeing // kinds)
    last = np.searchsorted(costs[changes], room, side="right") - 1
    first, second = _two_lowest(losses[changes], changes // kinds)
    partner = np.where(changes[first[last]] // kinds == tensor, second[last], first[last])
    possible = (last >= 0) & (partner >= 0)
    total = np.where(possible, freed_loss + losses[changes[partner]], np.inf)
    pair = int(total.argmin())
    if not total[pair] < -least:
        return ()
    found = [int(changes[partner[pair]])] + ([int(freeing[pair - 1])] if pair else [])
    return tuple(divmod(change, kinds) for change in found)


def _two_lowest(values: Floats, tensors: Indices) -> tuple[Indices, Indices]:
    """For each prefix of `values`, the index of its lowest value, and the index of the lowest
    value of another tensor than that (-1 if there is none)."""
    first = _lowest(values)
    leader = tensors[first]
    # Where the leader changes, the former leader is the best of the other tensors, and lower than
    # every earlier value of the new leader.
    rival = np.where(tensors != leader, values, np.inf)
    index = np.arange(len(values))
    changed = np.flatnonzero(leader[1:] != leader[:-1]) + 1
    rival[changed], index[changed] = values[first[changed - 1]], first[changed - 1]
    lowest = _lowest(rival)
    return first, np.where(np.isfinite(rival[lowest]), index[lowest], -1)


def _lowest(values: Floats) -> Indices:
    """For each prefix of `values`, the index at which its lowest value first occurs."""
    before = np.append(np.inf, np.minimum.accumulate(values)[:-1])
    return np.maximum.accumulate(np.where(values < before, np.arange(len(values)), 0))
