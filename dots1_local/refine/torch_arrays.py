"""Refinement's arrays as tensors, on any device that torch knows.

The device multiplies and factors matrices. Rounding within a panel is a long chain of small steps,
which the cores of a CPU are better at: the kernels get a panel's columns in numpy's arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.refine.blocks import BlockFormat, Blocks
from dots1_local.refine.kernels import Kernels, Panel

__all__ = ["TorchArrays"]


@dataclass(frozen=True)
class TorchArrays:
    """Tensors on `device`; see arrays.Arrays."""

    device: str

    def load(self, array: NDArray[np.float32]) -> Tensor:
        return torch.tensor(array, dtype=torch.float32, device=self.device)

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

    def kernels(self, form: BlockFormat) -> "HostKernels":
        return HostKernels(form)


class HostKernels:
    """kernels.Kernels for tensors; blocks are numpy's."""

    def __init__(self, form: BlockFormat) -> None:
        self._kernels = Kernels(form)

    def panel(self, start: int, form: Tensor, diagonal: Tensor) -> Panel:
        """A panel for this type, on the host."""
        return self._kernels.panel(start, _host(form), _host(diagonal))

    def feed(
        self, panel: Panel, weights: Tensor, errors: Tensor, blocks: Blocks, targets: Tensor
    ) -> None:
        """Round a panel with error feedback."""
        self._call(self._kernels.feed, panel, weights, errors, blocks, _host(targets))

    def descend(
        self,
        panel: Panel,
        weights: Tensor,
        errors: Tensor,
        blocks: Blocks,
        gradients: Tensor,
        coupling: Tensor | None = None,
        moved: Tensor | None = None,
    ) -> None:
        """Change every code, scale and min of a panel once where that lowers the error."""
        state = [_host(x) for x in (gradients, coupling, moved) if x is not None]
        self._call(self._kernels.descend, panel, weights, errors, blocks, *state)
        if moved is not None:
            moved.copy_(torch.from_numpy(state[2]))

    def _call(
        self,
        kernel: Callable[..., None],
        panel: Panel,
        weights: Tensor,
        errors: Tensor,
        blocks: Blocks,
        *state: NDArray[np.float32],
    ) -> None:
        left = _host(errors)
        kernel(panel, _host(weights), left, blocks, *state)
        errors.copy_(torch.from_numpy(left))


def _host(tensor: Tensor) -> NDArray[np.float32]:
    """A contiguous copy in numpy's memory."""
    return np.array(tensor.detach().cpu().numpy(), np.float32, order="C")
