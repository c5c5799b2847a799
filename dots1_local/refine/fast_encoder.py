"""A plain encoder made of the kernels, and the scales that refinement begins with.

A block's scales are the best of twelve for each sub-block, found with all codes at once: a group's
cost depends on its scale only through two products per code. Codes and scales are then chosen
together, as error feedback does, but no error is carried on.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dots1_local.ggml import QuantType
from dots1_local.quant.encode import encode
from dots1_local.refine.blocks import Blocks, block_format, pack, refinable, zero_blocks
from dots1_local.refine.kernels import Kernels, Panel
from dots1_local.refine.metric import Floats

__all__ = ["begin", "best_encode", "can_begin", "encode_fast"]

_PANEL = 256


def can_begin(kind: QuantType) -> bool:
    """Whether this encoder has scales for the type: codebooks with signs, and IQ4's.

    ggml is quick enough with the others.
    """
    return refinable(kind) and (
        block_format(kind).signs != "none" or kind.name in ("IQ4_NL", "IQ4_XS")
    )


def begin(matrix: Floats, kind: QuantType, importance: Floats, columns: int) -> Blocks:
    """Blocks of `columns` stored columns with scales for `matrix` (rows, unpadded columns).

    `importance` (unpadded columns,) weighs the columns. All codes are 0.
    """
    blocks, kernels = zero_blocks(kind, len(matrix), columns), Kernels(block_format(kind))
    matrix = np.ascontiguousarray(matrix)
    for panel in _diagonal_panels(kernels, importance):
        kernels.begin(panel, matrix[:, panel.columns], blocks)
    return blocks


def best_encode(
    matrix: Floats, kind: QuantType, importance: Floats | None = None
) -> NDArray[np.uint8]:
    """Encode with `encode_fast` if there is importance and it has scales for the type, else with
    ggml's encoder."""
    if importance is None or not can_begin(kind):
        return encode(matrix, kind, importance)
    return encode_fast(matrix, kind, importance)


def encode_fast(matrix: Floats, kind: QuantType, importance: Floats) -> NDArray[np.uint8]:
    """Encode `matrix` (rows, columns) to (rows, row_bytes), with `importance` (columns,)."""
    blocks, kernels = zero_blocks(kind, *matrix.shape), Kernels(block_format(kind))
    errors = np.zeros_like(matrix)
    for panel in _diagonal_panels(kernels, importance):
        rows, left = matrix[:, panel.columns], errors[:, panel.columns]
        kernels.begin(panel, rows, blocks)
        kernels.feed(panel, rows, left, blocks, rows.copy())
        gradients = left * np.einsum("gii->gi", panel.diagonal).ravel()
        kernels.descend(panel, rows, left, blocks, gradients)
    return pack(blocks, kind)


def _diagonal_panels(kernels: Kernels, importance: Floats) -> Iterator[Panel]:
    least = max(float(importance.mean()) * 1e-6, 1e-30)
    weights = np.maximum(importance, least).astype(np.float32)
    for start in range(0, len(weights), _PANEL):
        yield kernels.diagonal_panel(start, weights[start : start + _PANEL])
