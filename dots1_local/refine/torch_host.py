"""kernels.cpp for tensors: a panel's columns are copied to the CPU and back.

Rounding is a long chain of small steps, which CPU cores are better at than a GPU. The matrix
products between panels, which are most of the arithmetic, stay on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dots1_local.refine.blocks import BlockFormat
from dots1_local.refine.kernels import Kernels, Panel
from dots1_local.refine.torch_blocks import TorchBlocks

__all__ = ["HostKernels", "TorchPanel"]


@dataclass(frozen=True)
class TorchPanel:
    """A panel as tensors; see kernels.Panel."""

    start: int
    form: Tensor
    diagonal: Tensor
    kernels: Kernels

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + len(self.form))

    @cached_property
    def on_host(self) -> Panel:
        """The panel for kernels.cpp, with columns counted from the panel's first."""
        form, diagonal = (x.contiguous().numpy(force=True) for x in (self.form, self.diagonal))
        return self.kernels.panel(0, form, diagonal)


class HostKernels:
    """kernels.Kernels with tensors and TorchBlocks, each on any device."""

    def __init__(self, form: BlockFormat) -> None:
        self._form, self._kernels = form, Kernels(form)

    def panel(self, start: int, form: Tensor, diagonal: Tensor) -> TorchPanel:
        """A panel for this type."""
        return TorchPanel(start, form, diagonal, self._kernels)

    def feed(
        self,
        panel: TorchPanel,
        weights: Tensor,
        errors: Tensor,
        blocks: TorchBlocks,
        targets: Tensor,
    ) -> None:
        """Round a panel with error feedback."""
        self._call(self._kernels.feed, panel, weights, errors, blocks, targets)

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
        """Change every code, scale and min of a panel once where that lowers the error."""
        state = [x for x in (gradients, coupling, moved) if x is not None]
        self._call(self._kernels.descend, panel, weights, errors, blocks, *state)

    def _call(
        self,
        kernel: Callable[..., None],
        panel: TorchPanel,
        weights: Tensor,
        errors: Tensor,
        blocks: TorchBlocks,
        *state: Tensor,
    ) -> None:
        whole = -(-panel.columns.stop // self._form.block) * self._form.block
        part = blocks.columns(panel.start, whole, self._form)
        tensors = (weights[:, panel.columns], errors[:, panel.columns], *state)
        base, left, *arrays = (x.contiguous().numpy(force=True) for x in tensors)
        here = part.fetch()
        kernel(panel.on_host, base, left, here, *arrays)
        received = state[2:]  # `moved`, if rows are coupled
        for tensor, array in zip((tensors[1], *received), (left, *arrays[2:]), strict=True):
            tensor.copy_(torch.from_numpy(array))
        part.change(TorchBlocks.load(here, part.d.device))
