"""Types under a budget: the least predicted damage that so many bytes buy.

A price on bytes, in nats, lets every tensor choose for itself the type of least damage plus price,
which walks down the convex hull of its possibilities, all tensors at the same slope. Bisection
finds the price that the budget calls for. What it leaves unspent goes by exact repair: the best
change of one tensor, or of two that pay for each other, until none improves. It begins at several
points of the hull, for it ends in different places, and the best of them is taken.

The root in the predicted divergence is replaced by its tangent at the plan so far, and again.
"""

from collections.abc import Callable, Container, Sequence
from operator import attrgetter

import numpy as np

from dots1_local.architecture import Dots1Config, padded_width
from dots1_local.errors import UsageError
from dots1_local.quant.allocation import Allocation, Solution, explain
from dots1_local.quant.choices import Choice, Choices, Cost, Floats, best_change, choices_at
from dots1_local.quant.plan import Override
from dots1_local.quant.recipes import Padding
from dots1_local.quant.sensitivity import Sensitivity

__all__ = ["TOLERANCE", "Allocator"]

TOLERANCE = 1e-3  # of the budget, that a plan may stay below it

_TANGENTS = 8  # at most; the plan mostly repeats itself after three
_REPAIRS = 10_000  # a bound no model comes near
# By how much the price is off where repair begins, beside 1, and how many tensors may differ there:
# a large model has so many small steps that repair near the budget ends well anyway.
_STARTS = (1.02, 1.05, 1.1, 1.25, 1.5, 2, 3)
_MOST_AWAY = 32
# How many tensors begin a change of three, and what part of the divergence makes one worthwhile.
_NEAREST, _WORTHWHILE = 32, 1e-4
_CHEAPEST, _DEAREST = np.log(1e-40), np.log(1e10)  # nats a byte


class Allocator:
    """Finds plans for one model, one sensitivity and any budget.

    `covered` holds the tensors that importance is there for (None: all). `cost` is what a tensor
    takes of the budget, its bytes unless said. An override decides a tensor's type; `padding`
    other than "auto" decides the expert width.
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
    ) -> None:
        sensitivity.check(config)
        self.config = config
        self._choices = [
            choices_at(
                width,
                config,
                sensitivity,
                covered=sensitivity.tensors if covered is None else covered,
                overrides=overrides,
                cost=cost,
            )
            for width in _widths(config, padding)
        ]
        self.smallest = min(c.size(c.smallest()) for c in self._choices)
        """The fewest bytes any plan takes."""
        self.least_kl, self.largest = min((c.kl(c.best()), c.size(c.best())) for c in self._choices)
        """The least divergence any plan has, and the bytes that takes; more buy nothing."""

    def within(
        self, nbytes: float, recipe: str, say: Callable[[float], str] = "{:.0f} B".format
    ) -> Allocation:
        """The plan of least predicted divergence that takes at most `nbytes`.

        It takes 0.1% less at most, unless every change or exchange that filled it up would do
        more damage. `say` words a number of bytes in errors, rounded up where it must round, so
        that both ends it names are possible.

        Raises:
            UsageError: no plan is so small, or the best is more than 0.1% smaller.
        """
        if not self.smallest <= nbytes <= self.largest / (1 - TOLERANCE):
            which = "small" if nbytes < self.smallest else "large"
            raise UsageError(
                f"{say(nbytes)} is too {which}: the smallest possible is {say(self.smallest)} "
                f"and the largest {say(self.largest)}"
            )
        fitting = [c for c in self._choices if c.size(c.smallest()) <= nbytes]
        solutions = [_within(choices, nbytes) for choices in fitting]
        return explain(self.config, sorted(solutions, key=lambda s: (s.kl, s.size)), nbytes, recipe)

    def reaching(self, kl: float, recipe: str) -> Allocation:
        """The smallest plan whose predicted divergence is at most `kl` nats a token.

        Raises:
            UsageError: no plan is so good.
        """
        if not kl >= self.least_kl:
            raise UsageError(
                f"a KL divergence of {kl:g} is out of reach: the best types are predicted to "
                f"have {1.005 * self.least_kl:.3g}"  # never rounded below it
            )
        able = [c for c in self._choices if c.kl(c.best()) <= kl]
        solutions = [_reaching(choices, kl) for choices in able]
        best = sorted(solutions, key=lambda s: (s.size, s.kl))
        return explain(self.config, best, best[0].size, recipe)


def _widths(config: Dots1Config, padding: Padding) -> list[int]:
    width = config.moe_intermediate_size
    both = {"off": width, "on": padded_width(width)}
    return sorted(set(both.values())) if padding == "auto" else [both[padding]]


def _within(choices: Choices, nbytes: float) -> Solution:
    def accept(choice: Choice) -> bool:
        return choices.size(choice) <= nbytes

    def repaired(choice: Choice) -> Choice:
        for _ in range(_REPAIRS):
            change = best_change(
                cost=_changes(choices.nbytes, choice),
                loss=_changes(choices.tangent(choice), choice),
                slack=nbytes - choices.size(choice),
                least=1e-9 * choices.kl(choice),
            )
            if not change:
                break
            choice = _changed(choice, change)
        return choice

    start, price = _priced(choices, accept, choices.smallest(), dearest=False)
    starts = _along_hull(choices, start, [price * factor for factor in _STARTS])
    found = [Solution(choices, repaired(s), price) for s in (start, *starts) if accept(s)]
    best = min(found, key=lambda s: (s.kl, s.size))
    while (change := _change_of_three(best, nbytes)) is not None:
        best = Solution(choices, repaired(_changed(best.choice, change)), price)
    return best


def _change_of_three(solution: Solution, nbytes: float) -> Sequence[tuple[int, int]] | None:
    """A change that no one and no two tensors make, begun with those nearest to the price."""
    choices, choice = solution.choices, solution.choice
    cost, loss = (_changes(m, choice) for m in (choices.nbytes, choices.tangent(choice)))
    slack, least = nbytes - solution.size, _WORTHWHILE * solution.kl
    apart = np.where(cost == 0, np.inf, loss + solution.price * cost)
    for move in np.argsort(apart, axis=None, kind="stable")[:_NEAREST]:
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
    return None


def _reaching(choices: Choices, kl: float) -> Solution:
    def accept(choice: Choice) -> bool:
        return choices.kl(choice) <= kl

    def repaired(choice: Choice) -> Choice:
        for _ in range(_REPAIRS):
            change = best_change(
                cost=_changes(choices.tangent(choice), choice),
                loss=_changes(choices.nbytes, choice),
                slack=kl - choices.kl(choice),
                least=0.5,
            )
            if not change or not accept(_changed(choice, change)):  # by a rounding error
                break
            choice = _changed(choice, change)
        return choice

    start, price = _priced(choices, accept, choices.best(), dearest=True)
    starts = _along_hull(choices, start, [price / factor for factor in _STARTS])
    found = [Solution(choices, repaired(s), price) for s in (start, *starts) if accept(s)]
    best = min(found, key=lambda s: (s.size, s.kl))
    # Repair from the other side, where the budget is bytes, may end lower still.
    while (least := (1 - TOLERANCE) * best.size) >= choices.size(choices.smallest()):
        smaller = _within(choices, least)
        if smaller.kl > kl:
            break
        best = smaller
    return best


def _along_hull(choices: Choices, choice: Choice, prices: Sequence[float]) -> list[Choice]:
    """The plans nearby that other prices lead to, at the same tangent."""
    tangent = choices.tangent(choice)
    plans = [(tangent + price * choices.nbytes).argmin(axis=1) for price in prices]
    return [plan for plan in plans if 0 < (plan != choice).sum() <= _MOST_AWAY]


def _priced(
    choices: Choices, accept: Callable[[Choice], bool], start: Choice, *, dearest: bool
) -> tuple[Choice, float]:
    """The acceptable choice at the least price of a byte, or at the `dearest`, and that price."""
    choice, price = start, 0.0
    for _ in range(_TANGENTS):
        before, tangent = choice, choices.tangent(choice)
        low, high = _CHEAPEST, _DEAREST
        found = start
        for _ in range(60):
            middle = (low + high) / 2
            tried = (tangent + np.exp(middle) * choices.nbytes).argmin(axis=1)
            accepted = accept(tried)
            if accepted:
                found, price = tried, float(np.exp(middle))
            low, high = (middle, high) if accepted == dearest else (low, middle)
        choice = found
        if np.array_equal(choice, before):
            break
    return choice, price


def _changes(matrix: Floats, choice: Choice) -> Floats:
    return matrix - np.take_along_axis(matrix, choice[:, None], axis=1)


def _changed(choice: Choice, change: Sequence[tuple[int, int]]) -> Choice:
    changed = choice.copy()
    for tensor, kind in change:
        changed[tensor] = kind
    return changed
