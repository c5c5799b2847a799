"""Take rows of ggml's blocks apart into scales, codes and signs, and put them together again.

A weight is d × steps[scale] × values[code] × sign - dmin × min. In F32 every product here is exact,
so `weights` gives what ggml's decoder gives, bit for bit. All bits of a block belong to a field, so
`pack` inverts `unpack` bit for bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import UsageError
from dots1_local.ggml import QuantType
from dots1_local.quant.encode import decode
from dots1_local.refine.block_layouts import FIELDS, LAYOUTS, Field, Layout

__all__ = [
    "BlockFormat",
    "Blocks",
    "block_format",
    "pack",
    "refinable",
    "unpack",
    "weights",
    "zero_blocks",
]

Floats = NDArray[np.float32]

# Seven signs of a group of eight columns, by the bits that store them: the number of minus signs is
# even, which gives the eighth.
_SEVEN = np.arange(128, dtype=np.uint8)
_EVEN_SIGNS = _SEVEN | (np.unpackbits(_SEVEN[:, None], axis=1).sum(1) % 2 << 7).astype(np.uint8)
# The factors of eight columns, by the byte of their signs.
_FACTORS = 1 - 2 * np.unpackbits(
    np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"
).astype(np.float32)

# Weights that are taken apart at a time, so that intermediate arrays stay in the CPU's cache.
_CHUNK = 1 << 17


@dataclass(frozen=True)
class BlockFormat:
    """How a type makes weights."""

    kind: QuantType
    block: int  # columns that share a d (and a dmin)
    sub: int  # columns that share a sub-scale and a min; all of the block if it has none
    vector: int  # columns of a code: 1, 4 or 8
    values: Floats  # (codes, vector): the values of each code; magnitudes if the type has signs
    steps: Floats  # (levels,), ascending: the factor of d of each sub-scale; [1] without sub-scales
    mins: int  # levels of mins; 1 if mins are always 1; 0 without mins
    signs: Literal["none", "free", "even"]  # "even": 8 columns have an even number of minus signs
    shared_half: bool  # the codes of a sub-block are all in one half of `values`


@dataclass
class Blocks:
    """Rows of blocks, taken apart. Fields that the type does not have are (rows, 0)."""

    d: Floats  # (rows, columns / block), values of F16
    dmin: Floats  # like d; for Q4_1 and Q5_1 the min that ggml adds, negated
    scales: NDArray[np.uint8]  # (rows, columns / sub): index into steps, 0 without sub-scales
    mins: NDArray[np.uint8]  # (rows, columns / sub): the factor of dmin
    codes: NDArray[np.uint16]  # (rows, columns / vector): index into values
    signs: NDArray[np.uint8]  # (rows, columns / 8): bit j says that column 8g + j is negative


def zero_blocks(kind: QuantType, rows: int, columns: int) -> Blocks:
    """Blocks whose every field is 0, except for mins that are always 1."""
    form = block_format(kind)
    per_block, per_sub = columns // form.block, columns // form.sub
    return Blocks(
        np.zeros((rows, per_block), np.float32),
        np.zeros((rows, per_block if form.mins else 0), np.float32),
        np.zeros((rows, per_sub), np.uint8),
        np.full((rows, per_sub if form.mins else 0), form.mins == 1, np.uint8),
        np.zeros((rows, columns // form.vector), np.uint16),
        np.zeros((rows, 0 if form.signs == "none" else columns // 8), np.uint8),
    )


def refinable(kind: QuantType) -> bool:
    """Whether blocks of this type have scales and codes that can be chosen.

    F32, F16 and BF16 have no blocks, the scales of MXFP4 are powers of two, and types that are no
    candidates of a measured mix are left as ggml encodes them.
    """
    return kind.name in LAYOUTS


def _layout(kind: QuantType) -> Layout:
    if not refinable(kind):
        raise UsageError(f"{kind.name} has no blocks whose scales and codes can be chosen")
    return LAYOUTS[kind.name]


@cache
def block_format(kind: QuantType) -> BlockFormat:
    """How `kind` makes weights; the values of its codes are read from ggml's decoder.

    Raises:
        UsageError: the type is not refinable.
    """
    layout = _layout(kind)
    first, increment = layout.steps
    levels = np.arange(layout.levels("scales"), dtype=np.float32)
    steps = np.float32(first) + np.float32(increment) * levels
    even = layout.levels("signs") == len(_EVEN_SIGNS)
    return BlockFormat(
        kind=kind,
        block=kind.block,
        sub=kind.block // max(layout.items("scales"), 1),
        vector=kind.block // layout.items("codes"),
        values=_values(kind, layout) / steps[-1],
        steps=steps,
        mins=layout.levels("mins") if layout.items("dmin") else 0,
        signs="even" if even else "free" if layout.items("signs") else "none",
        shared_half=any(bits.stride == 0 for bits in layout.bits),
    )


def _values(kind: QuantType, layout: Layout) -> Floats:
    """Decode every code (codes, vector), with d = 1, the last sub-scale and no minus signs."""
    n, codes = layout.levels("codes"), layout.items("codes")
    shape = (max(n // codes, 1), codes)
    items = _no_items(shape[0], layout)
    items["codes"][:] = np.resize(np.arange(n), shape)
    items["scales"][:] = layout.levels("scales") - 1
    items["d"][:] = np.float16(1).view(np.uint16)
    data = np.zeros((shape[0], kind.bytes), np.uint8)
    for bits in layout.bits:
        bits.write(items[bits.field], data)
    return decode(data, kind, kind.block).reshape(-1, kind.block // codes)[:n]


def unpack(data: NDArray[np.uint8], kind: QuantType) -> Blocks:
    """Take rows (rows, row_bytes) of blocks apart.

    Raises:
        UsageError: the type is not refinable.
    """
    layout = _layout(kind)
    rows, per_row = len(data), data.shape[1] // kind.bytes
    flat = data.reshape(-1, kind.bytes)
    items = _no_items(len(flat), layout)
    for chunk in _chunks(len(flat), kind):
        for bits in layout.bits:
            bits.read(flat[chunk], items[bits.field][chunk])
    d, dmin, scales, mins, codes, signs = (
        items[field].reshape(rows, per_row * items[field].shape[1]) for field in FIELDS
    )
    return Blocks(
        d=_from_half(d),
        dmin=-_from_half(dmin) if layout.adds_min else _from_half(dmin),
        scales=scales if scales.size else np.zeros(d.shape, np.uint8),
        mins=np.ones(d.shape, np.uint8) if layout.adds_min else mins,
        codes=codes,
        signs=_EVEN_SIGNS[signs] if block_format(kind).signs == "even" else signs,
    )


def pack(blocks: Blocks, kind: QuantType) -> NDArray[np.uint8]:
    """Put rows together, as ggml stores them: (rows, row_bytes).

    `d` and `dmin` are rounded to F16. The eighth of eight signs is not stored if their number is
    even, and IQ1_S stores one half for all codes of a sub-block.

    Raises:
        UsageError: the type is not refinable.
    """
    layout = _layout(kind)
    rows, per_row = blocks.d.shape
    items: dict[Field, NDArray[Any]] = {
        "d": _to_half(blocks.d),
        "dmin": _to_half(-blocks.dmin if layout.adds_min else blocks.dmin),
        "scales": blocks.scales,
        "mins": blocks.mins,
        "codes": blocks.codes,
        "signs": blocks.signs,
    }
    data = np.zeros((rows * per_row, kind.bytes), np.uint8)
    items = {field: values.reshape(len(data), -1) for field, values in items.items()}
    for chunk in _chunks(len(data), kind):
        for bits in layout.bits:
            bits.write(items[bits.field][chunk], data[chunk])
    return data.reshape(rows, per_row * kind.bytes)


def _no_items(blocks: int, layout: Layout) -> dict[Field, NDArray[Any]]:
    return {field: np.zeros((blocks, layout.items(field)), FIELDS[field]) for field in FIELDS}


def _chunks(blocks: int, kind: QuantType) -> Iterator[slice]:
    step = max(_CHUNK // kind.block, 1)
    return (slice(start, start + step) for start in range(0, blocks, step))


def _from_half(bits: NDArray[np.uint16]) -> Floats:
    return bits.view(np.float16).astype(np.float32)


def _to_half(values: Floats) -> NDArray[np.uint16]:
    return values.astype(np.float16).view(np.uint16)


def weights(blocks: Blocks, kind: QuantType) -> Floats:
    """The weights (rows, columns) of `blocks`, equal to those that ggml decodes.

    Raises:
        UsageError: the type is not refinable.
    """
    made = block_format(kind)
    rows, per_row = blocks.d.shape
    out = np.empty((rows, per_row * made.block), np.float32)
    step = max(_CHUNK // max(out.shape[1], 1), 1)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        part = Blocks(**{name: values[chunk] for name, values in vars(blocks).items()})
        out[chunk] = _weights(part, made).reshape(-1, out.shape[1])
    return out


def _weights(blocks: Blocks, made: BlockFormat) -> Floats:
    """The weights of a few rows, in the order in which ggml multiplies; (sub-blocks, sub)."""
    out = np.take(made.values, blocks.codes.reshape(-1), axis=0)
    if blocks.signs.size:
        out.reshape(-1, 8)[:] *= _FACTORS[blocks.signs.reshape(-1)]
    out = out.reshape(-1, made.sub)
    share = made.block // made.sub
    out *= (blocks.d.repeat(share, axis=1) * made.steps[blocks.scales]).reshape(-1, 1)
    if made.mins:
        out -= (blocks.dmin.repeat(share, axis=1) * blocks.mins).reshape(-1, 1)
    return out
