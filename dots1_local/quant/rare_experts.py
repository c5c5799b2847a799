"""Experts that calibration saw little of: how many, and what to make of them.

A mean square over five tokens is mostly noise, and llama.cpp gives an expert without any token the
weight 1 in every column, whatever its layer's scale. Both are drawn towards the layer's mean here:

    importance = (tokens * own mean + (least - tokens) * layer's mean) / least

below `least` tokens, and from there on the expert's own.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST", "Coverage", "coverage", "shrink"]

LEAST = 100  # tokens from which an expert's own mean stands; its error is then 10% or so

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Coverage:
    """The tokens that reached the routed experts of one layer."""

    layer: int
    experts: int
    unseen: int
    rare: int  # unseen ones among them
    fewest: int
    median: int


def coverage(layer: int, counts: Floats, least: int = LEAST) -> Coverage:
    """What `counts` (experts,) of a layer come to; experts below `least` tokens are rare."""
    return Coverage(
        layer,
        len(counts),
        int((counts == 0).sum()),
        int((counts < least).sum()),
        int(counts.min()),
        int(np.median(counts)),
    )


def shrink(sums: Floats, counts: Floats, least: int = LEAST) -> tuple[Floats, Floats]:
    """Sums (experts, columns) and counts (experts,) whose quotient is the shrunk importance.

    Counts stay, but that an unseen expert's is 1: without a count there is no quotient.
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
