"""Where ggml's types store the fields of a block.

A block is a struct of packed integers. Each `Bits` of a layout says where some bits of a field are;
a field whose bits are in several places has several. The layouts are those of ggml-common.h. MXFP4,
whose scales are powers of two, is not here, and neither are types that measured mixes do not use.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["FIELDS", "LAYOUTS", "Bits", "Field", "Layout"]

Field = Literal["d", "dmin", "scales", "mins", "codes", "signs"]

# The integers that the items of a field are kept in. "d" and "dmin" are the bits of an F16.
FIELDS: dict[Field, type[np.uint8] | type[np.uint16]] = {
    "d": np.uint16,
    "dmin": np.uint16,
    "scales": np.uint8,
    "mins": np.uint8,
    "codes": np.uint16,
    "signs": np.uint8,
}


@dataclass(frozen=True)
class Bits:
    """Bits of the items of a field, in the `words` integers from byte `offset` of a block.

    Each word holds `width` bits of `lanes` items. Those of the first item begin at bit `low`, and
    those of the next are `stride` bits higher (by default `width`). Items of one lane are adjacent
    for `run` words: words w to w + run - 1 hold items lanes × w to lanes × (w + run) - 1, lane by
    lane. In an item, the bits begin at bit `at`. The first item is item `start`.
    """

    field: Field
    offset: int
    words: int
    width: int
    lanes: int = 1
    run: int = 1
    low: int = 0
    stride: int | None = None
    at: int = 0
    start: int = 0
    word: Literal["u1", "<u2", "<u4", "<u8"] = "u1"
    flip: int = 0  # a mask of bits that are stored inverted, which orders signed integers

    @property
    def items(self) -> int:
        """The number of items up to the last of these."""
        return self.start + self.words * self.lanes

    def read(self, blocks: NDArray[np.uint8], items: NDArray[np.unsignedinteger]) -> None:
        """Set these bits in `items` (blocks, items), which are 0 so far."""
        words = np.ascontiguousarray(blocks[:, self._bytes]).view(self.word)
        words = words.reshape(len(blocks), -1, self.run)
        for shift, lane in self._lanes(items):
            bits = ((words >> shift) & self._mask).astype(items.dtype)
            np.bitwise_or(lane, (bits ^ self.flip) << self.at, out=lane)

    def write(self, items: NDArray[np.unsignedinteger], blocks: NDArray[np.uint8]) -> None:
        """Set these bits in `blocks` (blocks, bytes), where they are 0 so far."""
        words = np.zeros((len(blocks), self.words // self.run, self.run), self.word)
        for shift, lane in self._lanes(items):
            bits = ((lane >> self.at) & self._mask) ^ self.flip
            words |= bits.astype(words.dtype) << shift
        blocks[:, self._bytes] |= words.reshape(len(blocks), -1).view(np.uint8)

    @property
    def _bytes(self) -> slice:
        return slice(self.offset, self.offset + self.words * np.dtype(self.word).itemsize)

    @property
    def _mask(self) -> int:
        return (1 << self.width) - 1

    def _lanes(
        self, items: NDArray[np.unsignedinteger]
    ) -> Iterator[tuple[int, NDArray[np.unsignedinteger]]]:
        """The shift of each lane, and a view (blocks, words / run, run) of its items."""
        here = items[:, self.start : self.items]
        here = here.reshape(len(items), self.words // self.run, self.lanes, self.run)
        stride = self.width if self.stride is None else self.stride
        return ((self.low + lane * stride, here[:, :, lane]) for lane in range(self.lanes))


@dataclass(frozen=True)
class Layout:
    """The bits of a block, and what levels of its sub-scales stand for.

    Level s multiplies d by first + s × increment, with `steps` = (first, increment).
    """

    bits: tuple[Bits, ...]
    steps: tuple[float, float] = (1.0, 0.0)
    adds_min: bool = False  # ggml adds the min to a weight; the field dmin holds it negated

    def items(self, field: Field) -> int:
        """The number of items of a field in a block; 0 if blocks do not have the field."""
        return max((bits.items for bits in self.bits if bits.field == field), default=0)

    def levels(self, field: Field) -> int:
        """The number of values that an item of a field can have."""
        widths = (bits.at + bits.width for bits in self.bits if bits.field == field)
        return 1 << max(widths, default=0)


def _half(field: Literal["d", "dmin"], offset: int) -> Bits:
    return Bits(field, offset, 1, 16, word="<u2")


def _nibbles(field: Field, offset: int, words: int, run: int = 1) -> Bits:
    return Bits(field, offset, words, 4, lanes=2, run=run)


# Scales and mins of Q4_K and Q5_K: six bits each, in 12 bytes.
_SIX_BITS = (
    Bits("scales", 4, 4, 6),
    Bits("scales", 12, 4, 4, start=4),
    Bits("scales", 4, 4, 2, low=6, at=4, start=4),
    Bits("mins", 8, 4, 6),
    Bits("mins", 12, 4, 4, low=4, start=4),
    Bits("mins", 8, 4, 2, low=6, at=4, start=4),
)
_D_DMIN = (_half("d", 0), _half("dmin", 2))

LAYOUTS: dict[str, Layout] = {
    "Q2_K": Layout(
        (
            _half("d", 80),
            _half("dmin", 82),
            Bits("scales", 0, 16, 4),
            Bits("mins", 0, 16, 4, low=4),
            Bits("codes", 16, 64, 2, lanes=4, run=32),
        ),
        steps=(0, 1),
    ),
    "Q3_K": Layout(
        (
            _half("d", 108),
            Bits("scales", 96, 8, 4, lanes=2, run=8),
            Bits("scales", 104, 4, 2, lanes=4, run=4, at=4),
            Bits("codes", 32, 64, 2, lanes=4, run=32),
            Bits("codes", 0, 32, 1, lanes=8, run=32, at=2),
        ),
        steps=(-32, 1),
    ),
    "Q4_K": Layout((*_D_DMIN, *_SIX_BITS, _nibbles("codes", 16, 128, run=32)), steps=(0, 1)),
    "Q5_K": Layout(
        (
            *_D_DMIN,
            *_SIX_BITS,
            _nibbles("codes", 48, 128, run=32),
            Bits("codes", 16, 32, 1, lanes=8, run=32, at=4),
        ),
        steps=(0, 1),
    ),
    "Q6_K": Layout(
        (
            _half("d", 208),
            Bits("scales", 192, 16, 8, flip=0x80),
            _nibbles("codes", 0, 128, run=64),
            Bits("codes", 128, 64, 2, lanes=4, run=32, at=4),
        ),
        steps=(-128, 1),
    ),
    "IQ2_XXS": Layout(
        (
            _half("d", 0),
            Bits("codes", 2, 8, 8, lanes=4, word="<u8"),
            Bits("signs", 2, 8, 7, lanes=4, low=32, word="<u8"),
            Bits("scales", 2, 8, 4, low=60, word="<u8"),
        ),
        steps=(0.125, 0.25),
    ),
    "IQ2_XS": Layout(
        (
            _half("d", 0),
            Bits("codes", 2, 32, 9, word="<u2"),
            Bits("signs", 2, 32, 7, low=9, word="<u2"),
            _nibbles("scales", 66, 8),
        ),
        steps=(0.125, 0.25),
    ),
    "IQ2_S": Layout(
        (
            _half("d", 0),
            Bits("codes", 2, 32, 8),
            Bits("codes", 66, 8, 2, lanes=4, at=8),
            Bits("signs", 34, 32, 8),
            _nibbles("scales", 74, 8),
        ),
        steps=(0.125, 0.25),
    ),
    "IQ3_XXS": Layout(
        (
            _half("d", 0),
            Bits("codes", 2, 64, 8),
            Bits("signs", 66, 8, 7, lanes=4, word="<u4"),
            Bits("scales", 66, 8, 4, low=28, word="<u4"),
        ),
        steps=(0.25, 0.5),
    ),
    "IQ3_S": Layout(
        (
            _half("d", 0),
            Bits("codes", 2, 64, 8),
            Bits("codes", 66, 8, 1, lanes=8, at=8),
            Bits("signs", 74, 32, 8),
            _nibbles("scales", 106, 4),
        ),
        steps=(1, 2),
    ),
    "IQ4_NL": Layout((_half("d", 0), _nibbles("codes", 2, 16, run=16))),
    "IQ4_XS": Layout(
        (
            _half("d", 0),
            _nibbles("scales", 4, 4),
            Bits("scales", 2, 2, 2, lanes=4, at=4),
            _nibbles("codes", 8, 128, run=16),
        ),
        steps=(-32, 1),
    ),
    "Q4_0": Layout((_half("d", 0), _nibbles("codes", 2, 16, run=16))),
    "Q4_1": Layout((*_D_DMIN, _nibbles("codes", 4, 16, run=16)), adds_min=True),
    "Q5_0": Layout(
        (
            _half("d", 0),
            _nibbles("codes", 6, 16, run=16),
            Bits("codes", 2, 4, 1, lanes=8, at=4),
        )
    ),
    "Q5_1": Layout(
        (*_D_DMIN, _nibbles("codes", 8, 16, run=16), Bits("codes", 4, 4, 1, lanes=8, at=4)),
        adds_min=True,
    ),
    "Q8_0": Layout((_half("d", 0), Bits("codes", 2, 32, 8, flip=0x80))),
    "IQ1_S": Layout(
        (
            _half("d", 0),
            Bits("codes", 2, 32, 8),
            Bits("codes", 34, 8, 3, lanes=4, at=8, word="<u2"),
            Bits("codes", 34, 8, 1, lanes=4, low=15, stride=0, at=11, word="<u2"),
            Bits("scales", 34, 8, 3, low=12, word="<u2"),
        ),
        steps=(1, 2),
    ),
    "IQ1_M": Layout(
        (
            *(Bits("d", 49 + 2 * part, 1, 4, low=4, at=4 * part) for part in range(4)),
            Bits("codes", 0, 32, 8),
            Bits("codes", 32, 16, 4, lanes=2, at=8),
            Bits("scales", 48, 4, 3, lanes=4, word="<u2"),
        ),
        steps=(1, 2),
    ),
}
