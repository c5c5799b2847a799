"""Which blocks do not decode to finite numbers, told from their scales alone.

Whatever else a block holds is a small integer, so its weights are finite if its 16-bit scales
are: the largest is 65504 times a few thousand. MXFP4's scale is a power of two up to 2^127, and
from 2^126 on a weight may overflow. ggml has the same check, but it prints to stderr.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["bad_blocks", "block_bytes"]

# Bytes of a block, and where in it float16 scales lie.
_SCALES = {
    "Q4_0": (18, 0), "Q4_1": (20, 0, 2), "Q5_0": (22, 0), "Q5_1": (24, 0, 2), "Q8_0": (34, 0),
    "Q2_K": (84, 80, 82), "Q3_K": (110, 108), "Q4_K": (144, 0, 2), "Q5_K": (176, 0, 2),
    "Q6_K": (210, 208), "IQ1_S": (50, 0), "IQ2_XXS": (66, 0), "IQ2_XS": (74, 0), "IQ2_S": (82, 0),
    "IQ3_XXS": (98, 0), "IQ3_S": (110, 0), "IQ4_NL": (18, 0), "IQ4_XS": (136, 0),
    "TQ1_0": (54, 52), "TQ2_0": (66, 64), "Q1_0": (18, 0), "Q2_0": (18, 0), "F16": (2, 0),
}  # fmt: skip
_SIZES = {"BF16": 2, "F32": 4, "F64": 8, "MXFP4": 17, "IQ1_M": 56}
# Integers are always finite, and so are NVFP4's 8-bit scales as ggml decodes them.
_ALWAYS = ("I8", "I16", "I32", "I64", "NVFP4")


def block_bytes(kind: str) -> int:
    """Bytes of a block of `kind`; 1 for those that are always finite."""
    return _SCALES[kind][0] if kind in _SCALES else _SIZES.get(kind, 1)


def bad_blocks(data: NDArray[np.uint8], kind: str) -> NDArray[np.intp]:
    """The blocks of contiguous `data` that hold a NaN or an infinity, by their place in it."""
    if kind in _ALWAYS:
        return np.empty(0, np.intp)
    if kind in _SCALES:
        size, *places = _SCALES[kind]
        blocks = data.reshape(-1, size)
        bad = _is_special(blocks, places[0])
        for place in places[1:]:
            bad |= _is_special(blocks, place)
    else:
        bad = _OTHERS[kind](data)
    return np.flatnonzero(bad)


def _is_special(blocks: NDArray[np.uint8], place: int) -> NDArray[np.bool_]:
    """Whether the float16 at `place` of each block has all bits of its exponent set."""
    special: NDArray[np.bool_] = (blocks[:, place + 1] & 0x7C) == 0x7C
    return special


def _bf16(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    bad: NDArray[np.bool_] = (data.view(np.uint16) & 0x7F80) == 0x7F80
    return bad


def _f32(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return ~np.isfinite(data.view(np.float32))


def _f64(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return ~np.isfinite(data.view(np.float64))


def _mxfp4(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    bad: NDArray[np.bool_] = data.reshape(-1, 17)[:, 0] >= 253  # weights of up to 12 × 2^(e - 128)
    return bad


def _iq1_m(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Its scale is spread over the top four bits of four 16-bit words at the block's end."""
    blocks = data.reshape(-1, 56)
    bad: NDArray[np.bool_] = ((blocks[:, 53] & 0xC0) == 0xC0) & ((blocks[:, 55] & 0x70) == 0x70)
    return bad


_OTHERS = {"BF16": _bf16, "F32": _f32, "F64": _f64, "MXFP4": _mxfp4, "IQ1_M": _iq1_m}
