"""A plan made for a budget, with the reasons for it: contributions, alternatives, and price."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dots1_local.architecture import Dots1Config, Role, inventory
from dots1_local.ggml import TYPES
from dots1_local.quant.choices import KINDS, Choice, Choices
from dots1_local.quant.plan import PlannedTensor, QuantPlan
from dots1_local.quant.stock import file_type

__all__ = [
    "Allocation", "OtherWidth", "OwnTypes", "Part", "Solution", "TypeChange", "explain", "plan_of",
    "summarise",
]  # fmt: skip

_MOST_CHANGES = 5  # upgrades, and as many downgrades


@dataclass(frozen=True)
class TypeChange:
    """Another type for one tensor, and the bytes and the KL divergence (nats a token) it adds."""

    tensor: str
    before: str
    after: str
    nbytes: float
    kl: float


@dataclass(frozen=True)
class OtherWidth:
    """Size and KL divergence of the best plan at the other expert width."""

    expert_width: int
    nbytes: float
    kl: float


@dataclass(frozen=True)
class OwnTypes:
    """Size and KL divergence of the best plan in which each layer's experts have types of their
    own."""

    nbytes: float
    kl: float


@dataclass(frozen=True)
class Allocation:
    """A plan with its predicted KL divergence `kl`, in nats a token.

    `price` is how much another GB would lower `kl`, and `shares` is each tensor's contribution to
    it. `upgrades` are the changes that would lower it most per byte but did not fit; `downgrades`
    are those that would free bytes at the least increase. `other` is None if only one expert width
    is possible, and `own_types` if experts need not have one layout.
    """

    plan: QuantPlan
    nbytes: float
    kl: float
    price: float
    shares: Mapping[str, float]
    upgrades: tuple[TypeChange, ...]
    downgrades: tuple[TypeChange, ...]
    other: OtherWidth | None
    own_types: OwnTypes | None = None


@dataclass(frozen=True)
class Part:
    """All tensors of one role and part: the number of each type, and their totals."""

    role: Role
    part: str
    types: Mapping[str, int]
    parameters: int
    nbytes: int
    kl: float


@dataclass(frozen=True)
class Solution:
    """A type for every tensor at one expert width; `price` is in nats per byte."""

    choices: Choices
    choice: Choice
    price: float

    @property
    def size(self) -> float:
        return self.choices.size(self.choice)

    @property
    def kl(self) -> float:
        return self.choices.kl(self.choice)


def plan_of(config: Dots1Config, choices: Choices, choice: Choice, recipe: str) -> QuantPlan:
    """The plan of a choice by tensor; it is labelled by the type that takes most bytes."""
    chosen, bytes_by_type = choices.types(choice), Counter[str]()
    types = {s.name: chosen.get(s.name, "F32") for s in inventory(config, choices.width)}
    for spec in inventory(config, choices.width):
        kind = types[spec.name]
        bytes_by_type[kind] += PlannedTensor(spec, TYPES[kind]).nbytes
    label = file_type(bytes_by_type.most_common(1)[0][0])
    return QuantPlan(recipe, choices.width, label, types)


def explain(
    config: Dots1Config,
    solutions: Sequence[Solution],
    budget: float,
    recipe: str,
    own_types: Solution | None = None,
) -> Allocation:
    """Turn the first of `solutions`, which is the best, into a plan; the second, if there is one,
    is the best at the other expert width. `own_types` is the best without one layout."""
    best = solutions[0]
    choices, choice = best.choices.by_tensor(best.choice)
    shares = zip(choices.specs, choices.shares(choice), strict=True)
    upgrades = _changes(best, more_than=budget - best.size)
    # The smallest plan follows from any price that is high enough; the best upgrade bounds it.
    price = min(best.price, max((-change.kl / change.nbytes for change in upgrades), default=0.0))
    return Allocation(
        plan_of(config, choices, choice, recipe),
        best.size,
        best.kl,
        price * 1e9,
        {spec.name: float(share) for spec, share in shares},
        upgrades,
        _changes(best, more_than=None),
        next((OtherWidth(s.choices.width, s.size, s.kl) for s in solutions[1:]), None),
        None if own_types is None else OwnTypes(own_types.size, own_types.kl),
    )


def _changes(solution: Solution, more_than: float | None) -> tuple[TypeChange, ...]:
    """The best changes of one tensor: those that add more bytes than `more_than`, or, if that is
    None, those that free bytes.

    They are sorted by nats per byte: the largest decrease, or the smallest increase, first.
    """
    choices, choice = solution.choices, solution.choice
    rows = np.arange(len(choice))
    nbytes, damage, flips = (
        matrix - matrix[rows, choice][:, None]
        for matrix in (choices.nbytes, choices.damage, choices.flips)
    )
    present = float(choices.flips[rows, choice].sum())
    kl = damage + np.sqrt(np.maximum(present + flips, 0)) - math.sqrt(present)
    usable = np.isfinite(nbytes)
    usable &= nbytes < 0 if more_than is None else (nbytes > max(more_than, 0)) & (kl < 0)
    rate = np.divide(kl, np.abs(nbytes), out=np.full_like(kl, np.inf), where=usable)
    best = rate.argmin(axis=1)
    order = np.argsort(rate[rows, best], kind="stable")[:_MOST_CHANGES]
    return tuple(
        TypeChange(
            choices.specs[row].name,
            KINDS[choice[row]],
            KINDS[best[row]],
            float(nbytes[row, best[row]]),
            float(kl[row, best[row]]),
        )
        for row in order
        if np.isfinite(rate[row, best[row]])
    )


def summarise(tensors: Iterable[PlannedTensor], shares: Mapping[str, float]) -> list[Part]:
    """The plan by role and part, in file order; all norms are one part, as are all routers."""
    groups: dict[tuple[Role, str], list[PlannedTensor]] = {}
    for tensor in tensors:
        role = tensor.spec.role
        part = "" if role in ("norm", "router") else tensor.spec.part
        groups.setdefault((role, part), []).append(tensor)
    return [
        Part(
            role,
            part,
            dict(Counter(tensor.kind.name for tensor in group).most_common()),
            sum(tensor.spec.source_elements for tensor in group),
            sum(tensor.nbytes for tensor in group),
            math.fsum(shares.get(tensor.spec.name, 0.0) for tensor in group),
        )
        for (role, part), group in groups.items()
    ]
