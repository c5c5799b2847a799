"""A picture of KL divergence by token, in text: how many tokens are how far off."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["histogram"]

_LOWEST, _HIGHEST = -21, 9  # thirds of a decade: 1e-7, under which all is rounding, to 1000
_MARKS = (10.0, 50.0, 90.0, 99.0, 99.9)
_WIDTH = 36
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def histogram(values: NDArray[np.float32]) -> str:
    """Bars of the tokens (values,) by KL divergence, on a log scale, in at most 80 columns.

    A row is a third of a decade and begins at the value printed; the first holds all below 1e-7,
    zero and negative values included. At the right: the percentiles that fall into the row.
    """
    if not values.size:
        return "no tokens"
    places = np.clip(np.searchsorted(_edges(), values, side="right"), 0, _HIGHEST - _LOWEST)
    counts = np.bincount(places)
    marks = np.searchsorted(np.cumsum(counts), np.array(_MARKS) / 100 * (values.size - 1), "right")
    first = int(places.min())
    rows = ["KL divergence tokens"]
    for place, count in enumerate(counts[first:].tolist(), first):
        label = f"{10 ** ((_LOWEST + place - 1) / 3):.1e}" if place else "below"
        names = " ".join(
            f"{mark:g}%" for mark, at in zip(_MARKS, marks, strict=True) if at == place
        )
        bar = _bar(count / int(counts.max()))
        rows.append(f"{label:>8} {count:>11,}  {bar:<{_WIDTH}} {names}".rstrip())
    return "\n".join(rows)


def _edges() -> NDArray[np.float32]:
    return (10 ** (np.arange(_LOWEST, _HIGHEST) / 3)).astype(np.float32)


def _bar(share: float) -> str:
    """A bar in eighths of a character; what is there shows as one of them at least."""
    eighths = max(round(share * _WIDTH * 8), share > 0)
    return (_EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()
