"""The quadratic form that the errors of a matrix are weighed by.

If a weight matrix W is stored as Q, with E = W - Q, the mean square of the change in its outputs is
tr(E H E'), where H is the second moment of its inputs, the mean of x x'. With HO, the second moment
of the gradients of the KL divergence at its outputs, the objective is tr(HO E H E').
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Metric", "input_metric", "output_metric"]

Floats = NDArray[np.float32]

_OUTPUT_DAMPING = 0.03
# Part of the mean diagonal that is added to H, by tokens per column.
_DAMPING = ((20, 0.01), (10, 0.05), (5, 0.1), (0, 0.3))


@dataclass(frozen=True)
class Metric:
    """H (columns, columns) and HO (rows, rows), shrunk and damped; without HO, rows count alike."""

    inputs: Floats
    outputs: Floats | None = None


def input_metric(second_moment: Floats, tokens: int, prior: Floats | None = None) -> Floats:
    """Shrink the mean of x x' (columns, columns) over `tokens` rows towards `prior`, and damp it.

    A moment over few tokens is mostly noise. It counts as `tokens` observations, and the prior as
    one for each column.
    """
    columns = len(second_moment)
    shrunk = second_moment
    if prior is not None:
        shrunk = (tokens * second_moment + columns * prior) / np.float32(tokens + columns)
    observations = tokens + (columns if prior is not None else 0)
    part = next(part for least, part in _DAMPING if observations >= least * columns)
    return _damped(shrunk, part)


def output_metric(moment: Floats) -> Floats:
    """Scale the second moment of gradients (rows, rows) to the mean diagonal 1, and damp it."""
    return _damped(moment / np.float32(max(np.trace(moment) / len(moment), 1e-30)), _OUTPUT_DAMPING)


def _damped(moment: Floats, part: float) -> Floats:
    mean = float(np.trace(moment)) / len(moment)
    return moment + np.eye(len(moment), dtype=np.float32) * np.float32(part * mean)
