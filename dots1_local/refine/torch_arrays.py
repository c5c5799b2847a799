"""Refinement's arrays as tensors, on any device that torch knows."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.refine.blocks import BlockFormat, Blocks
from dots1_local.refine.torch_blocks import TorchBlocks
from dots1_local.refine.torch_host import HostKernels
from dots1_local.refine.torch_kernels import TorchKernels

__all__ = ["TorchArrays"]


@dataclass(frozen=True)
class TorchArrays:
    """Tensors on `device`; see arrays.Arrays.

    Panels are rounded by kernels.cpp on the CPU, or on the device if `rounds_there`.
    """

    device: str
    rounds_there: bool = False

    def load(self, array: NDArray[np.float32]) -> Tensor:
        return torch.tensor(array, dtype=torch.float32, device=self.device)

    def load_blocks(self, blocks: Blocks) -> TorchBlocks:
        return TorchBlocks.load(blocks, torch.device(self.device if self.rounds_there else "cpu"))

    def fetch_blocks(self, blocks: TorchBlocks) -> Blocks:
        return blocks.fetch()

    def zeros_like(self, array: Tensor) -> Tensor:
        return torch.zeros_like(array)

    def inverse(self, squares: Tensor) -> Tensor:
        inverted: Tensor = torch.linalg.inv(squares.double())
        return inverted.float()

    def factor(self, moment: Tensor, damping: float) -> Tensor:
        flipped = moment.flip(0, 1)
        flipped.diagonal().add_(damping)
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if failed:
            raise np.linalg.LinAlgError
        return lower.flip(0, 1)

    def kernels(self, form: BlockFormat) -> HostKernels | TorchKernels:
        if not self.rounds_there:
            return HostKernels(form)
        return TorchKernels(form, torch.device(self.device))
