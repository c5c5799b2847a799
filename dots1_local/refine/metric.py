"""The quadratic form that the errors of a matrix are weighed by.

If a weight matrix W is stored as Q, with E = W - Q, the mean square of the change in its outputs is
tr(E H E'), where H is the second moment of its inputs, the mean of x x'. With HO, the second moment
of the gradients of the KL divergence at its outputs, the objective is tr(HO E H E').

H is used as R R' with R upper triangular, so that a row's e H e' is a sum of squares in which each
column adds to what the columns before it left over. This is LDLQ's factor (QuIP, arXiv 2307.13304),
which gives GPTQ's feedback without inverting H.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Metric", "input_metric", "output_metric"]

Floats = NDArray[np.float32]

_OUTPUT_DAMPING = 0.03
# Part of the mean diagonal that is added to H, for at least so many tokens per column.
_DAMPING = ((20, 0.01), (5, 0.05), (2, 0.1), (0, 0.3))
_BLOCK = 256  # columns that are factored at a time
_SAMPLES = 256  # inputs to estimate an error on


@dataclass(frozen=True)
class Metric:
    """H (columns, columns) and HO (rows, rows), shrunk and damped; without HO, rows count alike.

    Everything derived from them is computed once. Threads may share a metric whose `factor` has
    been computed.
    """

    inputs: Floats
    outputs: Floats | None = None

    @cached_property
    def factor(self) -> Floats:
        """R (columns, columns), upper triangular, with R R' = H.

        If rounding errors make H indefinite, more damping is added first.
        """
        part = 0.0
        while True:
            try:
                return _factor(_damped(self.inputs, part))
            except np.linalg.LinAlgError:
                part = max(4 * part, 1e-3)

    @cached_property
    def samples(self) -> Floats:
        """Inputs (n, columns) whose second moment is H; always the same ones."""
        drawn = np.random.default_rng(0).standard_normal((_SAMPLES, len(self.inputs)), np.float32)
        return drawn @ self.factor.T

    def ratio(self, after: Floats, before: Floats, rows: slice, inputs: Floats) -> float:
        """Compare errors (rows, columns) of outputs on `inputs` (n, columns), weighed by HO.

        `before` are the errors of some `rows` only. If rows are coupled by HO, errors before are
        taken to be independent of one another, as those of a plain encoder are.
        """
        inputs = inputs[:: -(-len(inputs) // _SAMPLES)]
        outputs: Floats = after @ inputs.T
        each, earlier = (np.square(x).sum(axis=1) for x in (outputs, before @ inputs.T))
        coupled = 1.0
        if self.outputs is not None:
            diagonal = np.diag(self.outputs)
            each, earlier = each * diagonal, earlier * diagonal[rows]
            coupled = float(np.vdot(outputs, self.outputs @ outputs) / max(each.sum(), 1e-30))
        whole = float(earlier.sum())
        return coupled * float(each[rows].sum()) / whole if whole > 0 else 1.0


def input_metric(second_moment: Floats, tokens: int, prior: Floats | None = None) -> Floats:
    """Shrink the mean of x x' (columns, columns) over `tokens` rows towards `prior`, and damp it.

    A moment over few tokens is mostly noise. It counts as `tokens` observations, and the prior as
    one for each column.
    """
    columns = len(second_moment)
    shrunk, observations = second_moment, tokens
    if prior is not None:
        observations = tokens + columns
        shrunk = (tokens * second_moment + columns * prior) / np.float32(observations)
    return _damped(
        shrunk, next(part for least, part in _DAMPING if observations >= least * columns)
    )


def output_metric(moment: Floats) -> Floats:
    """Scale the second moment of gradients (rows, rows) to the mean diagonal 1, and damp it."""
    return _damped(moment / np.float32(max(_mean_diagonal(moment), 1e-30)), _OUTPUT_DAMPING)


def _mean_diagonal(moment: Floats) -> float:
    return float(np.trace(moment, dtype=np.float64)) / len(moment)


def _damped(moment: Floats, part: float) -> Floats:
    damped = moment.astype(np.float32)
    np.einsum("ii->i", damped)[:] += np.float32(max(part * _mean_diagonal(moment), 1e-30))
    return damped


def _factor(moment: Floats) -> Floats:
    """The upper triangular R with R R' = `moment`, which is overwritten.

    Blocks of columns are eliminated from the last to the first, so that most of the work is matrix
    products: numpy's own Cholesky is five times slower in F32.
    """
    stop = len(moment)
    while stop > 0:
        start = max(0, stop - _BLOCK)
        block, above = slice(start, stop), slice(0, start)
        corner = np.linalg.cholesky(moment[block, block][::-1, ::-1].astype(np.float64))
        corner = corner[::-1, ::-1]
        moment[block, block] = corner
        moment[block, above] = 0
        panel = moment[above, block] @ np.linalg.inv(corner).T.astype(np.float32)
        moment[above, block] = panel
        moment[above, above] -= panel @ panel.T
        stop = start
    return moment
