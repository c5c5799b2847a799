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

from dots1_local.refine.arrays import NUMPY, Array, Arrays

__all__ = ["Floats", "Metric", "input_metric", "output_metric"]

Floats = NDArray[np.float32]

_OUTPUT_DAMPING = 0.03
# Part of the mean diagonal that is added to H, for at least so many tokens per column. With 0.01,
# text like that of the calibration gains up to 1%, and other text loses 2 to 8%.
_DAMPING = ((20, 0.03), (5, 0.05), (2, 0.1), (0, 0.3))
_LEAST = 1e-30  # that is added to the diagonal
_SAMPLES = 256  # inputs to estimate an error on


@dataclass(frozen=True)
class Metric:
    """H (columns, columns) and HO (rows, rows), shrunk and damped; without HO, rows count alike.

    Everything derived from them is computed once. Threads may share a metric whose `factor` has
    been computed.
    """

    inputs: Array
    outputs: Array | None = None
    arrays: Arrays = NUMPY  # of which the two are

    def on(self, arrays: Arrays) -> "Metric":
        """This metric (of numpy's arrays) as other arrays; they are copied once."""
        if arrays == self.arrays:
            return self
        if arrays not in self._copies:
            outputs = None if self.outputs is None else arrays.load(self.outputs)
            self._copies[arrays] = Metric(arrays.load(self.inputs), outputs, arrays)
        return self._copies[arrays]

    @cached_property
    def _copies(self) -> "dict[Arrays, Metric]":
        return {}

    @cached_property
    def factor(self) -> Array:
        """R (columns, columns), upper triangular, with R R' = H.

        If rounding errors make H indefinite, more damping is added first.
        """
        part, mean = 0.0, float(self.inputs.diagonal().mean())
        while True:
            try:
                return self.arrays.factor(self.inputs, max(part * mean, _LEAST))
            except np.linalg.LinAlgError:
                part = max(4 * part, 1e-3)

    @cached_property
    def samples(self) -> Array:
        """Inputs (n, columns) whose second moment is H; always the same ones."""
        drawn = np.random.default_rng(0).standard_normal((_SAMPLES, len(self.inputs)), np.float32)
        return self.arrays.load(drawn) @ self.factor.T

    def ratio(self, after: Array, before: Array, rows: slice, inputs: Array) -> float:
        """Compare errors (rows, columns) of outputs on `inputs` (n, columns), weighed by HO.

        `before` are the errors of some `rows` only. If rows are coupled by HO, errors before are
        taken to be independent of one another, as those of a plain encoder are.
        """
        inputs = inputs[:: -(-len(inputs) // _SAMPLES)]
        outputs = after @ inputs.T
        each, earlier = ((x * x).sum(1) for x in (outputs, before @ inputs.T))
        coupled = 1.0
        if self.outputs is not None:
            diagonal = self.outputs.diagonal()
            each, earlier = each * diagonal, earlier * diagonal[rows]
            weighed = float((outputs * (self.outputs @ outputs)).sum())
            coupled = weighed / max(float(each.sum()), 1e-30)
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
    np.einsum("ii->i", damped)[:] += np.float32(max(part * _mean_diagonal(moment), _LEAST))
    return damped
