"""Quantise float32 rows to bytes of a type, and back, with ggml's own functions.

The bytes are those that stock llama-quantize writes for the same rows, importance and type.

A block's scales alone tell whether it decodes to finite numbers. Everything else in a block is a
small integer, so its weights are finite if its 16-bit scales are: the largest weight is 65504 times
a few thousand. MXFP4's scale is a power of two up to 2^127, and from 2^126 on a weight may
overflow. ggml has the same check, but it prints to stderr.

Some bytes mean nothing in a few types, although ggml decodes them: 243 of a TQ1_0 byte's 256
values stand for five ternary digits, TQ2_0 has no fourth code, and in NVFP4's scales 0x7F is the
NaN of E4M3 and larger bytes have a sign. Devices need not agree on them, so such a block is bad.
"""

import ctypes
from collections.abc import Callable
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from dots1_local import ggml
from dots1_local.errors import UsageError
from dots1_local.ggml import QuantType

__all__ = ["ZEROED_BLOCKS", "bad_blocks", "block_bytes", "decode", "encode", "is_zero"]

_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


# Columns that lose their weights (they decode to 0, or to noise) if the importance of all of them
# is 0. ggml's encoders of other types look at the weights alone, or have a least importance.
ZEROED_BLOCKS = {
    **dict.fromkeys(("Q6_K", "Q3_K", "IQ2_S", "IQ2_XS", "IQ1_M"), 16),
    **dict.fromkeys(("Q5_0", "Q4_0", "IQ4_NL", "IQ4_XS", "IQ3_XXS", "IQ2_XXS", "IQ1_S"), 32),
    **dict.fromkeys(("Q5_K", "Q4_K", "Q2_K"), 256),
}


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


def is_zero(data: NDArray[np.uint8], kind: QuantType) -> bool:
    """Whether all weights in whole blocks of contiguous `data` are 0."""
    blocks = data.reshape(1, -1)
    first = kind.row_bytes(kind.block)  # most data can be told by its first block
    return not any(
        decode(part, kind, part.size // first * kind.block).any()
        for part in (blocks[:, :first], blocks[:, first:])
        if part.size
    )


# Bytes of a block, and the places of its float16 scales.
_SCALES = {
    "Q4_0": (18, 0), "Q4_1": (20, 0, 2), "Q5_0": (22, 0), "Q5_1": (24, 0, 2), "Q8_0": (34, 0),
    "Q2_K": (84, 80, 82), "Q3_K": (110, 108), "Q4_K": (144, 0, 2), "Q5_K": (176, 0, 2),
    "Q6_K": (210, 208), "IQ1_S": (50, 0), "IQ2_XXS": (66, 0), "IQ2_XS": (74, 0), "IQ2_S": (82, 0),
    "IQ3_XXS": (98, 0), "IQ3_S": (110, 0), "IQ4_NL": (18, 0), "IQ4_XS": (136, 0),
    "Q1_0": (18, 0), "Q2_0": (18, 0), "F16": (2, 0),
}  # fmt: skip


def _bad_iq1_m(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """IQ1_M's scale is spread over the top four bits of four 16-bit words at the block's end."""
    blocks = data.reshape(-1, 56)
    bad: NDArray[np.bool_] = ((blocks[:, 53] & 0xC0) == 0xC0) & ((blocks[:, 55] & 0x70) == 0x70)
    return bad


# A byte holds five ternary digits as a fraction of 3^5, rounded up, or four digits and a 0.
_FIVE_DIGITS = np.isin(np.arange(256), -(-256 * np.arange(243) // 243))
_FOUR_DIGITS = np.isin(np.arange(256), -(-256 * np.arange(0, 243, 3) // 243))


def _bad_tq1_0(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    blocks = data.reshape(-1, 54)
    legal = _FIVE_DIGITS[blocks[:, :48]].all(1) & _FOUR_DIGITS[blocks[:, 48:52]].all(1)
    return ~legal | _special(blocks[:, 53])


def _bad_tq2_0(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    blocks = data.reshape(-1, 66)
    codes = blocks[:, :64]
    fourth = (codes & codes >> 1 & 0x55).any(1)
    return np.asarray(fourth | _special(blocks[:, 65]))


def _bad_nvfp4(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.asarray((data.reshape(-1, 36)[:, :4] >= 0x7F).any(1))


def _special(high: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether float16 numbers with these high bytes are NaN or infinite: all bits of the exponent
    are set."""
    special: NDArray[np.bool_] = (high & 0x7C) == 0x7C
    return special


# Bytes of a block, and which blocks are bad. Types in neither table are integers.
_OTHERS: dict[str, tuple[int, Callable[[NDArray[np.uint8]], NDArray[np.bool_]]]] = {
    "BF16": (2, lambda data: (data.view(np.uint16) & 0x7F80) == 0x7F80),
    "F32": (4, lambda data: ~np.isfinite(data.view(np.float32))),
    "F64": (8, lambda data: ~np.isfinite(data.view(np.float64))),
    "MXFP4": (17, lambda data: data.reshape(-1, 17)[:, 0] >= 253),  # weights of 12 × 2^(e - 128)
    "IQ1_M": (56, _bad_iq1_m),
    "TQ1_0": (54, _bad_tq1_0),
    "TQ2_0": (66, _bad_tq2_0),
    "NVFP4": (36, _bad_nvfp4),
}


def block_bytes(kind: str) -> int:
    """Bytes of a block of `kind`; 1 for types that are always finite."""
    return (_SCALES.get(kind) or _OTHERS.get(kind) or (1,))[0]


def bad_blocks(data: NDArray[np.uint8], kind: str) -> NDArray[np.intp]:
    """The indices of the blocks of contiguous `data` that hold a NaN, an infinity, or bytes that
    have no meaning in `kind`."""
    if kind in _OTHERS:
        return np.flatnonzero(_OTHERS[kind][1](data))
    if kind not in _SCALES:
        return np.empty(0, np.intp)
    size, *places = _SCALES[kind]
    blocks = data.reshape(-1, size)
    return np.flatnonzero(reduce(np.logical_or, (_special(blocks[:, p + 1]) for p in places)))
