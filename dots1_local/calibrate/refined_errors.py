"""The errors of a sample of refined rows, beside those of the same rows as ggml rounds them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["ErrorPair", "ErrorRows", "JudgedMatrix", "RefinedErrors"]

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
ErrorPair = tuple[float, float]  # squared errors of refined rows, and of ggml's


@dataclass(frozen=True)
class RefinedErrors:
    """The errors of the sampled rows of one tensor: for each type, a pair for each of `experts`."""

    experts: Sequence[int]
    errors: Mapping[str, Sequence[ErrorPair]]

    def ratios(self, costs: NDArray[np.floating]) -> dict[str, float]:
        """For each type, refined errors by ggml's, if an error costs `costs` (experts,)."""
        weights = costs[list(self.experts)]
        if not weights.any():
            weights = np.ones(len(self.experts))
        sums = {kind: weights @ np.array(pairs) for kind, pairs in self.errors.items()}
        return {kind: float(both[0] / both[1]) for kind, both in sums.items() if both[1] > 0}


@dataclass(frozen=True)
class ErrorRows:
    """The errors of some rows of one matrix in one type: refined, and as ggml rounds them.

    `numbers` (n,) are those of the rows, which were drawn with the probabilities `chances` (n,);
    `errors` are (2, n, columns).
    """

    numbers: NDArray[np.int64]
    chances: Doubles
    errors: Floats


@dataclass(frozen=True)
class JudgedMatrix:
    """A whole matrix that writes to the residual stream, by its name in the checkpoint.

    `metric` (columns, columns) is that of its inputs, `held_out` (n, columns) are inputs that it
    does not know, and `importance` (columns,) is for ggml's encoder.
    """

    source: str
    metric: Floats
    held_out: Floats
    importance: Floats
