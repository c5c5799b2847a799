"""Quantise float32 rows to bytes of a type, and back, with ggml's own functions.

The bytes are those that stock llama-quantize writes for the same rows, importance and type.
"""

import ctypes

import numpy as np
from numpy.typing import NDArray

from dots1_local import ggml
from dots1_local.errors import UsageError
from dots1_local.ggml import QuantType

__all__ = ["decode", "encode", "is_valid"]

_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """The head of ggml.h's `struct ggml_type_traits`, up to the function needed here."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _TO_FLOAT),
    )


def encode(
    rows: NDArray[np.float32],
    kind: QuantType,
    importance: NDArray[np.float32] | None = None,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Quantise `rows` (n_rows, n_columns), contiguous, to (n_rows, row_bytes).

    `importance` holds one weight per column, shared by all rows. Threads may call this at the same
    time.

    Raises:
        UsageError: the type needs importance and none is given, or rows do not fit its blocks.
    """
    n_rows, columns = rows.shape
    row_bytes = kind.row_bytes(columns)
    if kind.needs_importance and importance is None:
        raise UsageError(f"{kind.name} needs an importance matrix")
    if importance is not None and importance.shape != (columns,):
        raise UsageError(f"importance has {importance.size} columns where the rows have {columns}")
    if out is None:
        out = np.empty((n_rows, row_bytes), np.uint8)
    ggml.library().ggml_quantize_chunk(
        kind.ggml,
        rows.ctypes.data,
        out.ctypes.data,
        0,
        n_rows,
        columns,
        None if importance is None else importance.ctypes.data,
    )
    return out


def is_valid(data: NDArray[np.uint8], kind: QuantType) -> bool:
    """Whether ggml's own check finds only finite scales in contiguous encoded rows.

    Large finite weights can fail it, because a block scale is a 16-bit float. ggml prints the
    place to stderr.
    """
    valid = ggml.library().ggml_validate_row_data(kind.ggml, data.ctypes.data, data.nbytes)
    return bool(valid)


def decode(data: NDArray[np.uint8], kind: QuantType, columns: int) -> NDArray[np.float32]:
    """Dequantise bytes (n_rows, row_bytes) to float32 (n_rows, columns)."""
    out = np.empty((data.shape[0], columns), np.float32)
    if kind.name == "F32":
        out[:] = data.view(np.float32)
        return out
    traits = ggml.library().ggml_get_type_traits
    traits.restype = ctypes.POINTER(_TypeTraits)
    data = np.ascontiguousarray(data)
    traits(kind.ggml).contents.to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out
