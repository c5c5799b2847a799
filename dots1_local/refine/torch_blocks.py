"""Blocks as tensors, and the columns of a panel with rows last."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from dots1_local.refine.blocks import BlockFormat, Blocks

__all__ = ["Columns", "TorchBlocks"]


@dataclass
class TorchBlocks:
    """The fields of `Blocks` as tensors: F32, and I16 for integers."""

    d: Tensor
    dmin: Tensor
    scales: Tensor
    mins: Tensor
    codes: Tensor
    signs: Tensor

    @classmethod
    def load(cls, blocks: Blocks, device: torch.device) -> "TorchBlocks":
        """Copy blocks to a device."""
        arrays = (getattr(blocks, field.name) for field in fields(cls))
        kept = (x if x.dtype == np.float32 else x.astype(np.int16) for x in arrays)
        return cls(*(torch.tensor(array, device=device) for array in kept))

    def fetch(self) -> Blocks:
        """Copy blocks from the device."""
        copies = (x.contiguous().numpy(force=True) for x in vars(self).values())
        d, dmin, scales, mins, codes, signs = copies
        scales, mins, signs = (array.astype(np.uint8) for array in (scales, mins, signs))
        return Blocks(d, dmin, scales, mins, codes.astype(np.uint16), signs)

    def change(self, blocks: "TorchBlocks") -> None:
        """Copy the fields of other blocks."""
        for kept, changed in zip(vars(self).values(), vars(blocks).values(), strict=True):
            kept.copy_(changed)

    def columns(self, start: int, stop: int, form: BlockFormat) -> "TorchBlocks":
        """Views of the blocks in which the columns [start, stop) are."""
        sizes = (form.block, form.block, form.sub, form.sub, form.vector, 8)
        parts = (_items(slice(start, stop), size) for size in sizes)
        cut = zip(vars(self).values(), parts, strict=True)
        return TorchBlocks(*(tensor[:, part] for tensor, part in cut))


class Columns:
    """The columns [start, stop) of all rows, taken apart; every field is (items, rows).

    `part` stands for columns counted from `start`, from the first of a sub-block on.
    """

    def __init__(
        self, blocks: TorchBlocks, start: int, stop: int, form: BlockFormat, values: Tensor
    ) -> None:
        """`values` (codes, vector) and the blocks are on the same device."""
        self.form, self._width, self._values = form, stop - start, values
        self._blocks = blocks.columns(start, stop, form)
        self.d, self.dmin = self._blocks.d.T.contiguous(), self._blocks.dmin.T.contiguous()
        integers = (self._blocks.scales, self._blocks.mins, self._blocks.codes)
        self._scales, self._mins, self._codes = (x.T.long() for x in integers)
        self._signs = self._load_signs()  # (columns, rows): ±1, or (0, rows)

    def _load_signs(self) -> Tensor:
        bits = torch.arange(8, device=self.d.device, dtype=torch.int16)[:, None]
        negative = self._blocks.signs.T[:, None] >> bits & 1
        return 1 - 2 * negative.flatten(0, 1)[: self._width].float()

    def store(self) -> None:
        """Write the fields back to the blocks."""
        signs = self._signs
        if len(signs):
            bits = 1 << torch.arange(8, device=signs.device)[:, None]
            signs = ((signs < 0).unflatten(0, (-1, 8)) * bits).sum(1)
        fields_ = (self.d, self.dmin, self._scales, self._mins, self._codes, signs)
        for kept, changed in zip(vars(self._blocks).values(), fields_, strict=True):
            kept.copy_(changed.T)

    def levels(self, part: slice) -> tuple[Tensor, Tensor]:
        """The levels (1, rows) of a sub-block's scale and min; 0 without mins."""
        subs = _items(part, self.form.sub)
        scales = self._scales[subs]
        return scales, self._mins[subs] if self.form.mins else torch.zeros_like(scales)

    def chosen(self, part: slice) -> tuple[Tensor, Tensor]:
        """The codes and signs of a sub-block."""
        return self._codes[_items(part, self.form.vector)], self._signs[part]

    def change(
        self, part: slice, scales: Tensor, mins: Tensor, codes: Tensor, signs: Tensor
    ) -> None:
        """Set the levels, codes and signs of a sub-block."""
        subs = _items(part, self.form.sub)
        self._scales[subs], self._codes[_items(part, self.form.vector)] = scales, codes
        if self.form.mins:
            self._mins[subs] = mins
        if len(signs):
            self._signs[part] = signs

    def factors(self, part: slice, scales: Tensor, mins: Tensor) -> tuple[Tensor, Tensor]:
        """What a sub-block's values are multiplied by, and what is subtracted, at some levels."""
        block = part.start // self.form.block
        scale = self.d[block] * self._steps(scales)
        return scale, self.dmin[block] * mins if self.form.mins else torch.zeros_like(scale)

    def steps(self, part: slice) -> Tensor:
        """What d is multiplied by in a sub-block's scale (1, rows)."""
        return self._steps(self._scales[_items(part, self.form.sub)])

    @property
    def step(self) -> float:
        """By how much one level of a scale changes its factor of d."""
        first, last = (float(step) for step in self.form.steps[[0, -1]])
        return (last - first) / max(len(self.form.steps) - 1, 1)

    def weights(self, part: slice) -> Tensor:
        """The weights (columns, rows) of whole sub-blocks."""
        block = _items(part, self.form.block)
        made = _spread(self.d[block], self.form.block, part) * self.units(part)
        if not self.form.mins:
            return made
        return made - _spread(self.dmin[block], self.form.block, part) * self.lows(part)

    def units(self, part: slice) -> Tensor:
        """What d is multiplied by in each weight."""
        codes = self._codes[_items(part, self.form.vector)]
        values: Tensor = self._values[codes].movedim(2, 1).flatten(0, 1)
        if len(self._signs):
            values = values * self._signs[part]
        return values * _spread(self.steps(part), self.form.sub, part)

    def lows(self, part: slice) -> Tensor:
        """What dmin is multiplied by in each weight."""
        return _spread(self._mins[_items(part, self.form.sub)].float(), self.form.sub, part)

    def _steps(self, levels: Tensor) -> Tensor:
        return float(self.form.steps[0]) + self.step * levels


def _items(part: slice, size: int) -> slice:
    """The items of `size` columns that `part` lies in."""
    return slice(part.start // size, -(-part.stop // size))


def _spread(items: Tensor, size: int, part: slice) -> Tensor:
    """An item for each column of `part`."""
    spread: Tensor = items.repeat_interleave(size, 0)
    return spread[: part.stop - part.start]
