"""Where the search starts if experts have one layout in all layers.

A merged matrix of experts holds a third of the model. Changing its type frees or takes more bytes
than a change of one or two other tensors can balance, so repair alone does not find the way from
one combination of these types to the next. Hence every combination is tried, beside what the other
tensors choose at many prices; the search starts from the best few.
"""

from collections.abc import Callable
from itertools import product

import numpy as np

from dots1_local.quant.choices import Choice, Choices, Floats

__all__ = ["starts"]

_STARTS = 16
_PRICES = np.geomspace(1e-4, 1e4, 400)  # relative to the mean price of the model's bytes
_SLOPES = 5  # of the square root's tangent, from that of the smallest plan to that of the best


def starts(choices: Choices, rank: Callable[[Floats, Floats], Floats]) -> list[Choice]:
    """Choices to start from, the best first; none if nothing is merged.

    `rank` gives plans of these bytes and KL divergences a number each, the least to the best, and
    infinity to a plan that is not acceptable.
    """
    if choices.row_of is None:
        return []
    merged = np.flatnonzero(np.bincount(choices.row_of) > 1)
    others = _priced(choices)
    rest = np.setdiff1d(np.arange(len(choices.specs)), merged)
    nbytes, damage, flips = (
        matrix[rest, others[:, rest]].sum(1)
        for matrix in (choices.nbytes, choices.damage, choices.flips)
    )
    found: list[tuple[float, Choice]] = []
    for kinds in product(*(_useful(choices, row) for row in merged.tolist())):
        place = merged, list(kinds)
        size = choices.fixed_bytes + nbytes + choices.nbytes[place].sum()
        kl = damage + choices.damage[place].sum() + np.sqrt(flips + choices.flips[place].sum())
        ranks = rank(size, kl)
        best = int(ranks.argmin())
        if np.isfinite(ranks[best]):
            choice = others[best].copy()
            choice[merged] = kinds
            found.append((float(ranks[best]), choice))
    return [choice for _, choice in sorted(found, key=lambda each: each[0])[:_STARTS]]


def _priced(choices: Choices) -> Choice:
    """What tensors choose (prices x slopes, tensors) at several slopes of the square root."""
    smallest, best = choices.smallest(), choices.best()
    saved = choices.size(best) - choices.size(smallest)
    mean = (choices.kl(smallest) - choices.kl(best)) / max(saved, 1.0)
    rows = np.arange(len(best))
    first, last = (
        0.5 / max(float(choices.flips[rows, each].sum()), 1e-30) ** 0.5 for each in (smallest, best)
    )
    chosen = [smallest, best]
    for slope in np.geomspace(first, last, _SLOPES):
        loss = choices.damage + slope * choices.flips
        chosen += [(loss + price * choices.nbytes).argmin(1) for price in mean * _PRICES]
    return np.unique(chosen, axis=0)


def _useful(choices: Choices, row: int) -> list[int]:
    """The types of a matrix that no other type beats in bytes, damage and flips."""
    figures = np.stack([choices.nbytes[row], choices.damage[row], choices.flips[row]])
    kinds = np.flatnonzero(np.isfinite(figures[0])).tolist()
    return [
        kind
        for kind in kinds
        if not any(
            (figures[:, other] <= figures[:, kind]).all()
            and (figures[:, other] < figures[:, kind]).any()
            for other in kinds
        )
    ]
