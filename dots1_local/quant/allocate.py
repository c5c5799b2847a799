"""Choose types under a budget: the least predicted KL divergence for a number of bytes.

With a price on bytes, in nats, every tensor chooses for itself the type with the least sum of loss
and price; this follows the lower convex hull of each tensor's possible types, all at the same
slope (Lagrangian relaxation). Bisection finds the price that uses up the budget. The bytes that
this leaves are used by exact repair: the best change of one tensor, or of two tensors of which one
frees bytes for the other, until no change improves the plan. Repair starts from several points of
the hull, because it ends in different plans, and the best of them is taken.

The square root in the predicted divergence is replaced by its tangent at the present plan, and
again at the plan found with it.
"""

from collections.abc import Callable, Container, Sequence
from operator import attrgetter

import numpy as np

from dots1_local.architecture import Dots1Config
from dots1_local.errors import UsageError
from dots1_local.quant import one_layout
from dots1_local.quant.allocation import Allocation, Solution, explain
from dots1_local.quant.choices import (
    Change,
    Choice,
    Choices,
    Cost,
    Floats,
    best_change,
    choices_by_width,
)
from dots1_local.quant.plan import Override
from dots1_local.quant.recipes import Padding
from dots1_local.quant.sensitivity import Sensitivity

__all__ = ["TOLERANCE", "Allocator"]

TOLERANCE = 1e-3  # part of the budget that a plan may leave unused

_MOST_TANGENTS = 8  # the plan is mostly the same after three
_MOST_REPAIRS = 10_000  # far more than any model needs
# Repair also starts from the plans at these multiples of the price, unless they differ from the
# first plan in too many tensors: then the model has so many small steps that one start suffices.
_PRICE_FACTORS = (1.02, 1.05, 1.1, 1.25, 1.5, 2, 3)
_MOST_DIFFERENT = 32
# Changes of three tensors: how many first changes are tried, and how large a part of the KL
# divergence a change must save.
_FIRST_CHANGES, _LEAST_GAIN = 32, 1e-4
_LOWEST_PRICE, _HIGHEST_PRICE = np.log(1e-40), np.log(1e10)  # nats per byte


class Allocator:
    """Finds plans for one model, one sensitivity and any budget.

    `covered` holds the tensors with importance (None: all). `cost` gives a tensor's part of the
    budget, by default its bytes. An override decides a tensor's type; `padding` other than "auto"
    decides the expert width. With `one_layout`, each matrix of experts (gate, up and down) has one
    type in all layers.
    """

    def __init__(
        self,
        config: Dots1Config,
        sensitivity: Sensitivity,
        *,
        covered: Container[str] | None = None,
        padding: Padding = "auto",
        overrides: Sequence[Override] = (),
        cost: Cost = attrgetter("nbytes"),
        one_layout: bool = False,
    ) -> None:
        self.config, self._one_layout = config, one_layout
        self._choices = self._by_tensor = choices_by_width(
            config,
            sensitivity,
            covered=covered,
            padding=padding,
            overrides=overrides,
            cost=cost,
        )
        if one_layout:
            self._choices = [choices.merged() for choices in self._by_tensor]
        self.smallest = min(c.size(c.smallest()) for c in self._choices)
        """The bytes of the smallest plan."""
        self.least_kl, self.largest = min((c.kl(c.best()), c.size(c.best())) for c in self._choices)
        """The KL divergence of the best plan, and its bytes; more bytes would be of no use."""

    def within(
        self, nbytes: float, recipe: str, say: Callable[[float], str] = "{:.0f} B".format
    ) -> Allocation:
        """The plan of least predicted KL divergence that takes at most `nbytes`.

        It uses at least 99.9% of them, unless every change that used more would increase the KL
        divergence. `say` formats bytes for errors; it must round up, so that the sizes that the
        error names are possible.

        Raises:
            UsageError: every plan is larger, or the best one is more than 0.1% smaller.
        """
        if not self.smallest <= nbytes <= self.largest / (1 - TOLERANCE):
            which = "small" if nbytes < self.smallest else "large"
            raise UsageError(
                f"{say(nbytes)} is too {which}: the smallest possible is {say(self.smallest)} "
                f"and the largest {say(self.largest)}"
            )

        def best_of(possible: Sequence[Choices]) -> list[Solution]:
            fitting = [c for c in possible if c.size(c.smallest()) <= nbytes]
            solutions = [_within(choices, nbytes) for choices in fitting]
            return sorted(solutions, key=lambda s: (s.kl, s.size))

        own_types = best_of(self._by_tensor)[0] if self._one_layout else None
        return explain(self.config, best_of(self._choices), nbytes, recipe, own_types)

    def reaching(self, kl: float, recipe: str) -> Allocation:
        """The smallest plan whose predicted KL divergence is at most `kl` nats a token.

        Raises:
            UsageError: the best plan has more.
        """
        if not kl >= self.least_kl:
            raise UsageError(
                f"no plan has a KL divergence of {kl:g} or less: the best is predicted to have "
                f"{1.005 * self.least_kl:.3g}"  # a little more, so that rounding never names less
            )

        def best_of(possible: Sequence[Choices], most: float) -> list[Solution]:
            reached = [_reaching(c, most) for c in possible if c.kl(c.best()) <= most]
            return sorted(reached, key=lambda s: (s.size, s.kl))

        best, own_types = best_of(self._choices, kl), None
        if self._one_layout:  # in another order, the same sum may be a little larger
            own_types = best_of(self._by_tensor, kl * (1 + 1e-12))[0]
        return explain(self.config, best, best[0].size, recipe, own_types)


def _within(choices: Choices, nbytes: float) -> Solution:
    """The plan of least KL divergence that pricing and repair find within `nbytes`."""

    def accept(choice: Choice) -> bool:
        return choices.size(choice) <= nbytes

    def improvement(choice: Choice) -> Change:
        return best_change(
            cost=_relative(choices.nbytes, choice),
            loss=_relative(choices.tangent(choice), choice),
            slack=nbytes - choices.size(choice),
            least=1e-9 * choices.kl(choice),
        )

    start, price = _priced(choices, accept, choices.smallest(), highest=False)
    starts = _along_hull(choices, start, [price * factor for factor in _PRICE_FACTORS])
    starts += one_layout.starts(choices, lambda size, kl: np.where(size <= nbytes, kl, np.inf))
    plans = [_repaired(s, improvement) for s in (start, *starts) if accept(s)]
    best = min((Solution(choices, p, price) for p in plans), key=lambda s: (s.kl, s.size))
    while change := _change_of_three(best, nbytes):
        plan = _repaired(_changed(best.choice, change), improvement)
        best = Solution(choices, plan, price)
    return best


def _change_of_three(solution: Solution, nbytes: float) -> Change:
    """A change of three tensors that saves enough; empty if none is found.

    The first changes that are tried are those that fit the price best.
    """
    choices, choice = solution.choices, solution.choice
    cost, loss = (_relative(m, choice) for m in (choices.nbytes, choices.tangent(choice)))
    slack, least = nbytes - solution.size, _LEAST_GAIN * solution.kl
    apart = np.where(cost == 0, np.inf, loss + solution.price * cost)
    for move in np.argsort(apart, axis=None, kind="stable")[:_FIRST_CHANGES]:
        tensor, kind = divmod(int(move), cost.shape[1])
        if not np.isfinite(apart[tensor, kind]):
            break
        others = cost.copy()
        others[tensor] = np.inf
        change = best_change(
            others, loss, slack - cost[tensor, kind], least + float(loss[tensor, kind])
        )
        if change:
            return (tensor, kind), *change
    return ()


def _reaching(choices: Choices, kl: float) -> Solution:
    """The smallest plan that pricing and repair find with at most `kl`."""

    def accept(choice: Choice) -> bool:
        return choices.kl(choice) <= kl

    def improvement(choice: Choice) -> Change:
        change = best_change(
            cost=_relative(choices.tangent(choice), choice),
            loss=_relative(choices.nbytes, choice),
            slack=kl - choices.kl(choice),
            least=0.5,
        )
        # A rounding error may make the change unacceptable.
        return change if accept(_changed(choice, change)) else ()

    start, price = _priced(choices, accept, choices.best(), highest=True)
    starts = _along_hull(choices, start, [price / factor for factor in _PRICE_FACTORS])
    starts += one_layout.starts(choices, lambda size, found: np.where(found <= kl, size, np.inf))
    plans = [_repaired(s, improvement) for s in (start, *starts) if accept(s)]
    best = min((Solution(choices, p, price) for p in plans), key=lambda s: (s.size, s.kl))
    # With a budget in bytes a little below this size, repair may find a plan that is smaller still.
    while (least := (1 - TOLERANCE) * best.size) >= choices.size(choices.smallest()):
        smaller = _within(choices, least)
        if smaller.kl > kl:
            break
        best = smaller
    return best


def _repaired(choice: Choice, improvement: Callable[[Choice], Change]) -> Choice:
    """Apply improvements until there are none."""
    for _ in range(_MOST_REPAIRS):
        change = improvement(choice)
        if not change:
            break
        choice = _changed(choice, change)
    return choice


def _along_hull(choices: Choices, choice: Choice, prices: Sequence[float]) -> list[Choice]:
    """Other plans to start from: those at `prices` that differ in few tensors from `choice`."""
    tangent = choices.tangent(choice)
    plans = [(tangent + price * choices.nbytes).argmin(axis=1) for price in prices]
    return [plan for plan in plans if 0 < (plan != choice).sum() <= _MOST_DIFFERENT]


def _priced(
    choices: Choices, accept: Callable[[Choice], bool], start: Choice, *, highest: bool
) -> tuple[Choice, float]:
    """The acceptable choice at the lowest, or at the `highest`, price of a byte, and the price."""
    choice, price = start, 0.0
    for _ in range(_MOST_TANGENTS):
        before, tangent = choice, choices.tangent(choice)
        low, high = _LOWEST_PRICE, _HIGHEST_PRICE
        found = start
        for _ in range(60):
            middle = (low + high) / 2
            tried = (tangent + np.exp(middle) * choices.nbytes).argmin(axis=1)
            accepted = accept(tried)
            if accepted:
                found, price = tried, float(np.exp(middle))
            low, high = (middle, high) if accepted == highest else (low, middle)
        choice = found
        if np.array_equal(choice, before):
            break
    return choice, price


def _relative(matrix: Floats, choice: Choice) -> Floats:
    """The matrix less the values of the present choice."""
    return matrix - np.take_along_axis(matrix, choice[:, None], axis=1)


def _changed(choice: Choice, change: Change) -> Choice:
    changed = choice.copy()
    for tensor, kind in change:
        changed[tensor] = kind
    return changed
