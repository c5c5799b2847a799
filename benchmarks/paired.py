"""Statistics of two recipes on the same tokens, and of predictions and measurements.

Tokens of a chunk are not independent draws, chunks nearly are: errors come from the spread of
chunk means, and pairing takes out what makes a chunk hard for every recipe.
"""

from dataclasses import dataclass
from math import nan, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Comparison", "clustered_error", "compare", "spearman"]

Figures = NDArray[np.float32]  # (chunks, scored tokens)


@dataclass(frozen=True)
class Comparison:
    """`ratio` of two means ± `error`; `z` is their difference over its standard error."""

    ratio: float
    error: float
    z: float


def clustered_error(values: Figures) -> float:
    """Standard error of the mean of (chunks, tokens), whose chunks are independent draws.

    It is NaN for a single chunk, as it is in comparisons.
    """
    return _error(_by_chunk(values))


def compare(ours: Figures, theirs: Figures) -> Comparison:
    """Compare the means of `ours` and `theirs`, which are of the same tokens."""
    a, b = _by_chunk(ours), _by_chunk(theirs)
    ratio = float(a.mean() / b.mean())
    difference, error = float((a - b).mean()), _error(a - b)
    z = difference / error if error else 0.0
    return Comparison(ratio, _error(a - ratio * b) / float(b.mean()), z)


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation of two lists of the same length; equal values share their mean rank."""
    return float(np.corrcoef(_ranks(np.asarray(a)), _ranks(np.asarray(b)))[0, 1])


def _by_chunk(values: Figures) -> NDArray[np.float64]:
    means: NDArray[np.float64] = values.mean(axis=1, dtype=np.float64)
    return means


def _error(means: NDArray[np.float64]) -> float:
    return float(means.std(ddof=1)) / sqrt(len(means)) if len(means) > 1 else nan


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: NDArray[np.float64] = (last - (counts - 1) / 2)[place]
    return means
