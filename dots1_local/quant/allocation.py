"""A plan made for a budget, and why it is as it is."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dots1_local.architecture import Dots1Config, Role, inventory
from dots1_local.quant.choices import KINDS, Choice, Choices
from dots1_local.quant.plan import PlannedTensor, QuantPlan
from dots1_local.quant.stock import stock_mix

__all__ = ["Allocation", "Move", "Outcome", "Part", "Solution", "explain", "summarise"]

_MOVES = 5  # of either kind are worth a look


@dataclass(frozen=True)
class Move:
    """Another type for one tensor: what it adds in bytes, and in nats a token."""

    tensor: str
    before: str
    after: str
    nbytes: float
    kl: float


@dataclass(frozen=True)
class Outcome:
    """The best plan at an expert width."""

    expert_width: int
    nbytes: float
    kl: float


@dataclass(frozen=True)
class Allocation:
    """A plan with its predicted KL divergence, in nats a token.

    `price` is how much a further GB lowers that. `shares` is what each tensor adds to it.
    `upgrades` are those that lower it most a byte and did not fit, `downgrades` those that save
    bytes at the least damage; `other` is what the other expert width would have come to.
    """

    plan: QuantPlan
    nbytes: float
    kl: float
    price: float
    shares: Mapping[str, float]
    upgrades: tuple[Move, ...]
    downgrades: tuple[Move, ...]
    other: Outcome | None


@dataclass(frozen=True)
class Part:
    """Tensors of one role and part: how many of each type, and what they come to."""

    role: Role
    part: str
    types: Mapping[str, int]
    parameters: int
    nbytes: int
    kl: float


@dataclass(frozen=True)
class Solution:
    """A type for every tensor at one expert width; `price` in nats a byte."""

    choices: Choices
    choice: Choice
    price: float

    @property
    def size(self) -> float:
        return self.choices.size(self.choice)

    @property
    def kl(self) -> float:
        return self.choices.kl(self.choice)


def explain(
    config: Dots1Config, solutions: Sequence[Solution], budget: float, recipe: str
) -> Allocation:
    """The first of `solutions`, the best, as a plan; the second is what it is compared with."""
    best = solutions[0]
    choices, choice = best.choices, best.choice
    chosen = choices.types(choice)
    specs = inventory(config, choices.width)
    types = {spec.name: chosen.get(spec.name, "F32") for spec in specs}
    bytes_by_type: Counter[str] = Counter()
    for planned in QuantPlan(recipe, choices.width, 0, types).tensors(config):
        bytes_by_type[planned.kind.name] += planned.nbytes
    label = stock_mix(bytes_by_type.most_common(1)[0][0])
    shares = zip(choices.specs, choices.shares(choice), strict=True)
    upgrades = _moves(best, more_than=budget - best.size)
    # At the small end of the hull any price above the best upgrade's leads to the same plan.
    price = min(best.price, max((-move.kl / move.nbytes for move in upgrades), default=0.0))
    return Allocation(
        QuantPlan(recipe, choices.width, label.file_type, types),
        best.size,
        best.kl,
        price * 1e9,
        {spec.name: float(share) for spec, share in shares},
        upgrades,
        _moves(best, more_than=None),
        next((Outcome(s.choices.width, s.size, s.kl) for s in solutions[1:]), None),
    )


def _moves(solution: Solution, more_than: float | None) -> tuple[Move, ...]:
    """The best move of each tensor that takes more bytes than that, or, if None, that frees some.

    The best of them come first: the most nats a byte gained, or the fewest lost.
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
    order = np.argsort(rate[rows, best], kind="stable")[:_MOVES]
    return tuple(
        Move(
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
    """The plan by role and part, in file order; norms are one part, and routers."""
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
