"""Where refinement multiplies matrices: numpy on the CPU, or torch on any device.

numpy and torch write most operations on arrays alike, so that matrix.py and metric.py serve both.
`Arrays` has the operations that they write differently.
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import UsageError
from dots1_local.refine.blocks import BlockFormat
from dots1_local.refine.kernels import Kernels

__all__ = ["NUMPY", "Array", "Arrays", "arrays_on"]

Floats = NDArray[np.float32]

Array: TypeAlias = Any  # F32, of numpy or of torch: the two have no type in common

_BLOCK = 256  # columns that are factored at a time


class Arrays(Protocol):
    """What numpy and torch write differently."""

    def load(self, array: Floats) -> Array:
        """Take an array of numpy's to where these arrays are; it may be the same memory."""

    def zeros_like(self, array: Array) -> Array:
        """Zeros of an array's shape."""

    def inverse(self, squares: Array) -> Array:
        """Invert matrices (n, size, size) in F64."""

    def factor(self, moment: Array, damping: float) -> Array:
        """The upper triangular R with R R' = `moment` (n, n), and `damping` on its diagonal.

        Raises:
            numpy.linalg.LinAlgError: the moment is not positive definite.
        """

    def kernels(self, form: BlockFormat) -> Any:
        """The kernels for a type: `Kernels`, or a class with its interface."""


@dataclass(frozen=True)
class NumpyArrays:
    """numpy, and the C++ kernels."""

    def load(self, array: Floats) -> Floats:
        return np.ascontiguousarray(array, np.float32)

    def zeros_like(self, array: Floats) -> Floats:
        return np.zeros_like(array)

    def inverse(self, squares: Floats) -> Floats:
        return np.linalg.inv(squares.astype(np.float64)).astype(np.float32)

    def factor(self, moment: Floats, damping: float) -> Floats:
        damped = moment.astype(np.float32)
        np.einsum("ii->i", damped)[:] += np.float32(damping)
        return _factor(damped)

    def kernels(self, form: BlockFormat) -> Kernels:
        return Kernels(form)


NUMPY = NumpyArrays()


def arrays_on(device: str | None) -> Arrays:
    """torch on `device`, which is torch's name of it, such as "cuda:0"; without one, numpy.

    The device multiplies and factors matrices, and the CPU rounds.

    Raises:
        UsageError: torch is not installed.
    """
    if device is None:
        return NUMPY
    try:
        from dots1_local.refine.torch_arrays import TorchArrays
    except ModuleNotFoundError:
        raise UsageError(
            f"refinement on {device} computes with PyTorch: pip install 'dots1-local[torch]'"
        ) from None
    return TorchArrays(device)


def _factor(moment: Floats) -> Floats:
    """The upper triangular R with R R' = `moment`, which is overwritten.

    Blocks of columns are eliminated from the last to the first, so that most of the work is matrix
    products: numpy's own Cholesky is five times slower in F32.
    """
    stop = len(moment)
    while stop > 0:
        start = max(0, stop - _BLOCK)
        block, above = slice(start, stop), slice(0, start)
        corner = np.linalg.cholesky(moment[block, block][::-1, ::-1].astype(np.float64))
        corner = corner[::-1, ::-1]
        moment[block, block] = corner
        moment[block, above] = 0
        panel = moment[above, block] @ np.linalg.inv(corner).T.astype(np.float32)
        moment[above, block] = panel
        moment[above, above] -= panel @ panel.T
        stop = start
    return moment
