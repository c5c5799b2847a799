"""Choose a type and a place for every tensor within several limits.

Limits are bytes of a device, or seconds. At a price for each limit, every tensor chooses for itself
the place and type with the least sum of loss and prices (Lagrangian relaxation). The prices that
make this sum largest bound the loss from below; the ellipsoid method finds them. Limits that this
choice exceeds are kept by the changes that cost least. If the model is small, branch and bound then
searches what the bound leaves.
"""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGEST_SEARCH", "Options", "Pick", "least_loss"]

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

_MOST_STEPS = 400  # of the ellipsoid method
LARGEST_SEARCH = 48  # tensors; the steps of a larger model are small enough without a search
_PRECISION, _ROUGHLY = 1e-7, 1e-4  # of the loss, at which it stops: small models, and larger ones
_FEW = 8  # options of a tensor, the best at the prices, that a larger model is repaired with
_MOST_NODES = 4_000  # of branch and bound
_ROUNDING = 1e-12  # by which sums in another order may exceed a limit, relative to it


@dataclass(frozen=True)
class Pick:
    """A choice: the `place` of each tensor and its `kind`, the index of its type."""

    place: Indices
    kind: Indices


@dataclass(frozen=True)
class Options:
    """What can be chosen, and what it costs.

    `loss` is (places, tensors, types), and infinite where a type is not possible. `costs` is
    (limits, places, tensors, types), and `most` the limits.
    """

    loss: Floats
    costs: Floats
    most: Floats

    @cached_property
    def unit(self) -> Floats:
        """What each limit is counted in: itself, or more if it is next to nothing."""
        unit: Floats = np.maximum(self.most, 1e-6 * np.abs(self.costs).max((1, 2, 3)))
        return unit

    @property
    def allowed(self) -> Floats:
        """The limits, with room for rounding errors."""
        return self.most + _ROUNDING * self.unit

    def least(self) -> Floats:
        """What choices take of each limit at least, if that limit alone counts."""
        possible = np.where(np.isfinite(self.loss), self.costs, np.inf)
        least: Floats = possible.min((1, 3)).sum(1)
        return least


def least_loss(options: Options) -> Pick | None:
    """The choice of least loss that keeps all limits; None if no choice was found that does.

    With at most 48 tensors it is the best of all, if 4,000 nodes suffice to search them.
    """
    if (options.least() > options.allowed).any():
        return None
    table, columns = _possible(_Table(options))
    prices, bound, kept = _best_prices(table)
    excess = table.priced(prices)
    excess -= excess.min(1)[:, None]
    chosen = _kept_best(table, excess, kept)
    if len(excess) <= LARGEST_SEARCH:
        loss = np.inf if chosen is None else table.loss_of(chosen)
        better = _Search(table, excess, loss - bound, loss).run()
        chosen = chosen if better is None else better
    if chosen is None:
        return None
    return Pick(*np.divmod(columns[table.rows, chosen], options.loss.shape[2]))


def _possible(table: "_Table") -> tuple["_Table", Indices]:
    """The table with as many columns as tensors have possible options, and their numbers."""
    is_possible = np.isfinite(table.loss)
    columns = np.argsort(~is_possible, 1, kind="stable")[:, : is_possible.sum(1).max()]
    return table.only(columns), columns


class _Table:
    """Options as a matrix (tensors, places × types); costs are relative to the limits' units."""

    def __init__(self, options: Options) -> None:
        _, tensors, _ = options.loss.shape
        self.loss = options.loss.swapaxes(0, 1).reshape(tensors, -1)
        self.costs = options.costs.swapaxes(1, 2).reshape(len(options.most), tensors, -1)
        self.costs = self.costs / options.unit[:, None, None]
        self.most, self.allowed = (
            limit / options.unit for limit in (options.most, options.allowed)
        )
        self.rows = np.arange(tensors)

    def only(self, few: Indices) -> "_Table":
        """The same with the options `few` (tensors, any number) alone."""
        other = copy(self)
        other.loss = np.take_along_axis(self.loss, few, 1)
        other.costs = np.take_along_axis(self.costs, few[None], 2)
        return other

    def loss_of(self, chosen: Indices) -> float:
        """The sum of the losses of a choice."""
        return float(self.loss[self.rows, chosen].sum())

    def spent(self, chosen: Indices) -> Floats:
        """What a choice takes of each limit."""
        spent: Floats = self.costs[:, self.rows, chosen].sum(1)
        return spent

    def priced(self, prices: Floats) -> Floats:
        """Loss and what is paid for it."""
        priced: Floats = self.loss + np.tensordot(prices, self.costs, 1)
        return priced


def _best_prices(table: _Table) -> tuple[Floats, float, Indices | None]:
    """The prices with the highest bound on the loss, the bound, and the best choice at any prices
    that were tried that keeps all limits.

    Ellipsoid method with deep cuts (Shor 1977; Bland, Goldfarb & Todd 1981).
    """
    count = len(table.most)
    n = max(2, count)  # the method needs two dimensions
    finite = table.loss[np.isfinite(table.loss)]
    bound = float(table.loss.min(1).sum())
    radius = 100 * max(float(np.abs(finite).max()), abs(bound), 1e-300)
    center, shape = np.full(n, radius / 1e3), np.eye(n) * radius**2
    best, kept = np.zeros(count), None
    precision = _PRECISION if len(table.rows) <= LARGEST_SEARCH else _ROUGHLY
    for _ in range(_MOST_STEPS):
        slope = np.zeros(n)
        if center[negative := int(center.argmin())] < 0:
            slope[negative] = -1.0  # prices are not negative
            worse = -center[negative]
        else:
            prices = center[:count]
            priced = table.priced(prices)
            chosen = priced.argmin(1)
            value = float(priced[table.rows, chosen].sum() - prices @ table.most)
            if value > bound:
                best, bound = prices, value
            spent = table.spent(chosen)
            if (spent <= table.allowed).all():
                kept = min(chosen, chosen if kept is None else kept, key=table.loss_of)
            slope[:count] = table.most - spent
            worse = bound - value
        width = math.sqrt(max(0.0, float(slope @ shape @ slope)))
        if width <= max(worse, precision * bound):
            break
        depth, step = worse / width, shape @ slope / width
        center = center - (1 + n * depth) / (n + 1) * step
        cut = 2 * (1 + n * depth) / ((n + 1) * (1 + depth))
        shape = n**2 * (1 - depth**2) / (n**2 - 1) * (shape - cut * np.outer(step, step))
    return best, bound, kept


def _kept_best(table: _Table, excess: Floats, kept: Indices | None) -> Indices | None:
    """The best choice at the prices, repaired to keep all limits, or else `kept`."""
    few = np.argsort(excess, 1, kind="stable")
    if len(few) > LARGEST_SEARCH:
        few = few[:, :_FEW]
    small, least = table.only(few), np.take_along_axis(excess, few, 1)
    repaired = _repaired(small, least)
    if repaired is not None:
        return few[table.rows, _filled(small, repaired)]
    return None if kept is None else _filled(table, kept)


def _repaired(table: _Table, excess: Floats) -> Indices | None:
    """The best option of each tensor, changed until all limits are kept; None if that fails.

    `excess` (tensors, options) is the priced loss above that of the best option. Those changes come
    first that pay most for it.
    """
    chosen: Indices = excess.argmin(1)
    spent = table.spent(chosen)
    while (over := float(np.maximum(spent - table.allowed, 0).sum())) > 0:
        added = table.costs - table.costs[:, table.rows, chosen][:, :, None]
        after = np.maximum(spent[:, None, None] + added - table.allowed[:, None, None], 0).sum(0)
        helps = np.where(np.isfinite(excess), over - after, 0.0)
        more = np.maximum(excess - excess[table.rows, chosen][:, None], 0)
        rate = np.divide(more, helps, out=np.full_like(excess, np.inf), where=helps > 1e-15)
        tensor, option = np.unravel_index(int(rate.argmin()), rate.shape)
        if not np.isfinite(rate[tensor, option]):
            return None
        chosen[tensor] = option
        spent = table.spent(chosen)
    return chosen


def _filled(table: _Table, chosen: Indices) -> Indices:
    """A choice that uses up what is left of the limits, as long as that lowers the loss."""
    chosen = chosen.copy()
    while True:
        spent = table.spent(chosen)
        added = table.costs - table.costs[:, table.rows, chosen][:, :, None]
        fits = (spent[:, None, None] + added <= table.allowed[:, None, None]).all(0)
        gain = np.where(fits, table.loss[table.rows, chosen][:, None] - table.loss, 0.0)
        tensor, option = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[tensor, option] <= 0:
            return chosen
        chosen[tensor] = option


class _Option(NamedTuple):
    """One way to choose for a tensor; `excess` is its priced loss above that of the best way."""

    excess: float
    number: int
    loss: float
    costs: tuple[float, ...]


class _Search:
    """Depth-first branch and bound, the best option first, for less than `loss`.

    `gap` is how far that is above the bound: no option that exceeds it can be part of a better
    choice.
    """

    def __init__(self, table: _Table, excess: Floats, gap: float, loss: float) -> None:
        self._gap, self._loss = gap, loss - _ROUNDING * abs(loss) if np.isfinite(loss) else loss
        self._left = tuple(table.allowed.tolist())
        self._nodes = 0
        self._best: list[int] | None = None
        found = [
            sorted(
                _Option(float(row[k]), int(k), float(losses[k]), tuple(costs[:, k].tolist()))
                for k in np.flatnonzero(np.isfinite(row) & (row <= gap))
            )
            for row, losses, costs in zip(
                excess, table.loss, table.costs.swapaxes(0, 1), strict=True
            )
        ]
        spread = [each[1].excess if len(each) > 1 else np.inf for each in found]
        self._order = sorted(range(len(found)), key=lambda tensor: (-spread[tensor], tensor))
        self._options = [found[tensor] for tensor in self._order]
        self._least = [(0.0,) * (1 + len(self._left))]  # loss and costs of the tensors after
        for options in reversed(self._options):
            columns = zip(*((each.loss, *each.costs) for each in options), strict=True)
            least = zip(self._least[-1], map(min, columns), strict=True)
            self._least.append(tuple(a + b for a, b in least))
        self._least.reverse()

    def run(self) -> Indices | None:
        """The options of the best choice; None if there is none with less loss."""
        self._visit((), 0.0, 0.0, (0.0,) * len(self._left))
        if self._best is None:
            return None
        chosen = np.empty(len(self._order), np.intp)
        chosen[self._order] = self._best
        return chosen

    def _visit(
        self, chosen: tuple[int, ...], excess: float, loss: float, costs: tuple[float, ...]
    ) -> None:
        depth = len(chosen)
        if depth == len(self._options):
            if np.isfinite(self._loss):
                self._gap -= self._loss - loss
            self._best, self._loss = list(chosen), loss
            return
        for option, spent in self._fitting(depth, costs):
            self._nodes += 1
            if excess + option.excess > self._gap or self._nodes > _MOST_NODES:
                return
            if loss + option.loss + self._least[depth + 1][0] < self._loss:
                self._visit(
                    (*chosen, option.number), excess + option.excess, loss + option.loss, spent
                )

    def _fitting(
        self, depth: int, costs: tuple[float, ...]
    ) -> Iterator[tuple[_Option, tuple[float, ...]]]:
        least = self._least[depth + 1][1:]
        for option in self._options[depth]:
            spent = tuple(a + b for a, b in zip(costs, option.costs, strict=True))
            if all(a + b <= c for a, b, c in zip(spent, least, self._left, strict=True)):
                yield option, spent
