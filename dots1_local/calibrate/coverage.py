"""How many tokens reach each expert, and the importance of experts that few tokens reach."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEW_TOKENS", "Coverage", "coverage", "shrink"]

FEW_TOKENS = 100  # above this an expert's own mean is used; its error is then about 10%

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Coverage:
    """How many tokens the routed experts of one layer got; `rare` includes `unseen` experts."""

    layer: int
    experts: int
    unseen: int
    rare: int
    fewest: int
    median: int


def coverage(layer: int, counts: Floats, least: int = FEW_TOKENS) -> Coverage:
    """The coverage of a layer by `counts` (experts,); experts below `least` tokens are rare."""
    return Coverage(
        layer,
        len(counts),
        int((counts == 0).sum()),
        int((counts < least).sum()),
        int(counts.min()),
        int(np.median(counts)),
    )


def shrink(sums: Floats, counts: Floats, least: int = FEW_TOKENS) -> tuple[Floats, Floats]:
    """Draw the importance of experts with fewer than `least` tokens to their layer's mean.

    A mean square over five tokens is mostly noise, and llama.cpp gives an expert without tokens
    the weight 1 in every column, whatever its layer's scale. Below `least` tokens this uses instead

        importance = (tokens * own mean + (least - tokens) * layer's mean) / least

    Returns sums (experts, columns) and counts (experts,) with this quotient. Counts stay as they
    are, except that 0 becomes 1.
    """
    total = counts.sum(dtype=np.float64)
    rare = counts < least
    if total == 0 or not rare.any():
        return sums, counts
    mean = sums.sum(axis=0, dtype=np.float64) / total
    seen = counts[rare].astype(np.float64)[:, None]
    shrunk = (sums[rare] + (least - seen) * mean) / least
    sums, counts = sums.copy(), np.maximum(counts, 1)
    sums[rare] = shrunk * counts[rare, None]
    return sums, counts
