"""The best change of one or two choices at once, among all there are."""

import numpy as np
from numpy.typing import NDArray

from dots1_local.quant.choices import Floats

__all__ = ["best_change"]

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
