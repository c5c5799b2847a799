"""The kernels of kernels.cpp in torch, for tensors on any device.

All rows advance together: what kernels.cpp does for one row after another is one operation on
tensors whose last dimension is the row. Columns, or groups of columns that share a code, follow one
another. No operation reads a value back from the device, so that a GPU is not kept waiting.

A panel takes 2,500 to 8,500 operations, however many rows there are, so that a GPU is slow with the
rows of one matrix. Rows that HO couples change one after another; kernels.cpp does that on the CPU.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dots1_local.refine.blocks import BlockFormat
from dots1_local.refine.torch_blocks import Columns, TorchBlocks
from dots1_local.refine.torch_choice import Chooser, SubBlock
from dots1_local.refine.torch_host import HostKernels, TorchPanel
from dots1_local.refine.torch_levels import choose_levels

__all__ = ["TorchKernels"]

_LARGEST_HALF = 65504.0


class TorchKernels:
    """The kernels for one type, with the interface of kernels.Kernels."""

    def __init__(self, form: BlockFormat, device: torch.device) -> None:
        self._form = form
        self._values = torch.tensor(form.values, device=device)
        self._chooser = Chooser(form, device)
        self._host = HostKernels(form)

    def panel(self, start: int, form: Tensor, diagonal: Tensor) -> TorchPanel:
        """A panel for this type."""
        return self._host.panel(start, form, diagonal)

    def feed(
        self,
        panel: TorchPanel,
        weights: Tensor,
        errors: Tensor,
        blocks: TorchBlocks,
        targets: Tensor,
    ) -> None:
        """Round a panel with error feedback, as kernels.Kernels does."""
        columns, state = self._columns(panel, blocks), targets.T.contiguous()
        base = weights[:, panel.columns].T.contiguous()
        left = torch.empty_like(base)
        for part in _parts(slice(0, len(state)), self._form.sub):
            sub = self._sub_block(panel, columns, part, base[part], state[part], descends=False)
            left[part] = base[part] - choose_levels(self._chooser, columns, sub, part)
            state[part.stop :].addmm_(panel.form[part, part.stop :].T, left[part])
        errors[:, panel.columns] = left.T
        columns.store()

    def descend(
        self,
        panel: TorchPanel,
        weights: Tensor,
        errors: Tensor,
        blocks: TorchBlocks,
        gradients: Tensor,
        coupling: Tensor | None = None,
        moved: Tensor | None = None,
    ) -> None:
        """Change every code, scale and min once, as kernels.Kernels does."""
        if coupling is not None and moved is not None:
            self._host.descend(panel, weights, errors, blocks, gradients, coupling, moved)
            return
        columns, state = self._columns(panel, blocks), gradients.T.contiguous()
        for block in _parts(slice(0, len(state)), self._form.block):
            for part in _parts(block, self._form.sub):
                before = columns.weights(part)
                sub = self._sub_block(panel, columns, part, before, state[part], descends=True)
                change = before - choose_levels(self._chooser, columns, sub, part)
                state.addmm_(panel.form[part].T, change)
            number = block.start // self._form.block
            _descend_scale(panel, state, block, columns.units(block), columns.d[number])
            if self._form.mins:
                _descend_scale(panel, state, block, -columns.lows(block), columns.dmin[number])
        rounded = columns.weights(slice(0, len(state)))
        errors[:, panel.columns] = weights[:, panel.columns] - rounded.T
        columns.store()

    def _columns(self, panel: TorchPanel, blocks: TorchBlocks) -> Columns:
        return Columns(blocks, panel.start, panel.columns.stop, self._form, self._values)

    def _sub_block(
        self,
        panel: TorchPanel,
        columns: Columns,
        part: slice,
        base: Tensor,
        state: Tensor,
        *,
        descends: bool,
    ) -> SubBlock:
        groups = slice(part.start // self._form.vector, part.stop // self._form.vector)
        half = None
        if self._form.shared_half:
            half = columns.chosen(part)[0][0] * 2 // len(self._values)
        forms = (panel.form[part, part], panel.diagonal[groups])
        return SubBlock(*forms, base, state, descends, half)


def _parts(columns: slice, size: int) -> Iterator[slice]:
    for start in range(columns.start, columns.stop, size):
        yield slice(start, min(start + size, columns.stop))


def _descend_scale(
    panel: TorchPanel, state: Tensor, block: slice, units: Tensor, scale: Tensor
) -> None:
    """Make the best change of d, or dmin, of a block (rows,), with all codes as they are.

    `units` (columns, rows) are what it is multiplied by.
    """
    moves = panel.form[block].T @ units
    steep, curved = (state[block] * units).sum(0), (moves[block] * units).sum(0)
    best = (scale + steep / curved).clamp(-_LARGEST_HALF, _LARGEST_HALF).half().float()
    moved = torch.where(curved > 0, best - scale, 0)
    moved = torch.where(moved * (moved * curved - 2 * steep) < 0, moved, 0)
    scale += moved
    state.addcmul_(moves, moved, value=-1)
