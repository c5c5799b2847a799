"""The refinement of one matrix: error feedback, then coordinate descent.

The scales to begin with are those of a plain encoder. Error feedback (LDLQ; blocks of 4 or 8
columns for codebooks, as QuIP#'s BlockLDLQ) rounds column after column to what the errors before it
leave over. Coordinate descent then changes codes, scales and mins one at a time where that lowers
the error. Both work on panels of 256 columns: what a panel's errors do to the other columns is a
matrix product, and what they do within the panel is up to the kernels. In the end each row is
scaled so that its outputs are neither too small nor too large.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dots1_local.ggml import QuantType
from dots1_local.quant.encode import decode, encode
from dots1_local.refine.arrays import NUMPY, Array, Arrays
from dots1_local.refine.blocks import Blocks, block_format, pack, refinable, unpack
from dots1_local.refine.fast_encoder import begin, can_begin
from dots1_local.refine.kernels import Panel
from dots1_local.refine.metric import Floats, Metric

__all__ = ["ROUNDS", "Refined", "refine_matrix"]

ROUNDS = 4  # of coordinate descent; two have 3 to 8% more KL divergence
_PANEL = 256
_COUPLED = 128  # rows whose changes see one another at once
_COMPARED = 128  # rows that ggml's encoder is compared on
_LARGEST_SCALE = 1.25  # of a whole row, in the end


@dataclass(frozen=True)
class Refined:
    """A matrix (rows, row_bytes) in ggml's layout.

    `kept` says that these are the bytes of ggml's own encoder, because held-out rows did not
    improve. `fitted` is the error after refinement by that of ggml's encoder, in the metric;
    `held_out` the same for the outputs on held-out rows, NaN if there are none.
    """

    data: NDArray[np.uint8]
    kept: bool
    fitted: float
    held_out: float


def refine_matrix(
    matrix: Floats,
    kind: QuantType,
    metric: Metric,
    held_out: Floats | None,
    *,
    columns: int,
    importance: Floats | None = None,
    rounds: int = ROUNDS,
    arrays: Arrays = NUMPY,
) -> Refined:
    """Encode `matrix` (rows, unpadded columns) to rows of `columns` stored weights.

    `held_out` (n, unpadded columns) are inputs that the metric does not know. `importance`
    (unpadded columns,) is for ggml's encoder; by default it is the metric's diagonal. Types without
    blocks keep ggml's bytes. `arrays` compute; see arrays.arrays_on.
    """
    weighed = np.diag(metric.inputs) if importance is None else importance

    def plain(rows: slice) -> NDArray[np.uint8]:
        return encode(_padded(matrix[rows], columns), kind, _padded(weighed[None], columns)[0])

    if not refinable(kind):
        return Refined(plain(slice(None)), True, 1.0, 1.0)
    has_start = can_begin(kind)
    blocks = (
        begin(matrix, kind, weighed, columns) if has_start else unpack(plain(slice(None)), kind)
    )
    metric = metric.on(arrays)
    work = _Refinement(arrays, matrix, kind, metric, blocks)
    work.feed()
    for _ in range(rounds):
        work.descend()
    work.restore_size()
    step = slice(None, None, -(-len(matrix) // _COMPARED))
    before = arrays.load(matrix[step] - decode(plain(step), kind, columns)[:, : matrix.shape[1]])
    fitted = metric.ratio(work.errors, before, step, metric.samples)
    held = np.nan
    if held_out is not None:
        held = metric.ratio(work.errors, before, step, arrays.load(held_out))
    if not (fitted if held_out is None else held) < 1:
        return Refined(plain(slice(None)), True, fitted, held)
    return Refined(pack(work.blocks, kind), False, fitted, held)


def _padded(rows: Floats, columns: int) -> Floats:
    missing = columns - rows.shape[1]
    return np.ascontiguousarray(np.pad(rows, ((0, 0), (0, missing))), np.float32)


class _Refinement:
    """A matrix whose blocks change; `errors` (rows, columns) is what they differ by."""

    def __init__(
        self, arrays: Arrays, matrix: Floats, kind: QuantType, metric: Metric, blocks: Blocks
    ) -> None:
        self.blocks, self._metric = blocks, metric
        self._arrays, self._vector = arrays, block_format(kind).vector
        self._kernels = arrays.kernels(block_format(kind))
        self._matrix = arrays.load(matrix)
        self.errors = arrays.zeros_like(self._matrix)

    def feed(self) -> None:
        """Round all columns with error feedback."""
        factor = self._metric.factor
        for part in self._panels():
            corner = _groups(factor[part, part], self._vector)
            carried = _times_groups(factor[: part.stop, part], self._arrays.inverse(corner))
            targets = self._matrix[:, part] + self.errors[:, : part.start] @ carried[: part.start]
            diagonal = corner @ corner.swapaxes(1, 2)
            panel = self._kernels.panel(part.start, carried[part.start :], diagonal)
            rows, left = self._matrix[:, part], self.errors[:, part]
            self._kernels.feed(panel, rows, left, self.blocks, targets)

    def descend(self) -> None:
        """Change every code, scale and min once where that lowers the error."""
        moment, outputs = self._metric.inputs, self._metric.outputs
        for part in self._panels():
            form = moment[part, part]
            panel = self._kernels.panel(part.start, form, _groups(form, self._vector))
            gradients = self.errors @ moment[:, part]
            rows, left = self._matrix[:, part], self.errors[:, part]
            if outputs is None:
                self._kernels.descend(panel, rows, left, self.blocks, gradients)
            else:
                self._descend_coupled(panel, rows, left, gradients, outputs)

    def _descend_coupled(
        self, panel: Panel, matrix: Array, errors: Array, gradients: Array, outputs: Array
    ) -> None:
        """Descend in some rows at a time, because each row's best change depends on the others."""
        for start in range(0, len(gradients), _COUPLED):
            rows = slice(start, start + _COUPLED)
            scale = 1 / outputs.diagonal()[rows, None]
            moved = self._arrays.zeros_like(gradients[rows])
            self._kernels.descend(
                panel,
                matrix[rows],
                errors[rows],
                Blocks(*(field[rows] for field in vars(self.blocks).values())),
                (outputs[rows] @ gradients) * scale,
                outputs[rows, rows] * scale,
                moved,
            )
            gradients[rows] += moved

    def restore_size(self) -> None:
        """Scale each row so that the errors of its outputs do not depend on these outputs.

        Where the error is least, outputs are too small by the part e that it has of their mean
        square. Such errors of gate, up and down, of all experts and of all layers point the same
        way and add up, while other errors average out. Scaling raises the error by about e only.
        """
        weighed = self._matrix @ self._metric.inputs
        whole, stored = (
            (weighed * rows).sum(1) for rows in (self._matrix, self._matrix - self.errors)
        )
        sizes = np.array([whole.tolist(), stored.tolist()], np.float32)
        scales = np.divide(sizes[0], sizes[1], out=np.ones_like(sizes[0]), where=sizes[1] > 0)
        scales = scales.clip(1 / _LARGEST_SCALE, _LARGEST_SCALE)[:, None]
        for values in (self.blocks.d, self.blocks.dmin):
            values[:] = (values * scales).astype(np.float16)
        self.errors = self._matrix - (self._matrix - self.errors) * self._arrays.load(scales)

    def _panels(self) -> list[slice]:
        columns = self._matrix.shape[1]
        starts = range(0, columns, _PANEL)
        return [slice(start, min(start + _PANEL, columns)) for start in starts]


def _groups(square: Array, size: int) -> Array:
    """The blocks (n / size, size, size) on the diagonal of a matrix (n, n)."""
    count = len(square) // size
    cut = square.reshape(count, size, count, size)
    return cut.diagonal(0, 0, 2).swapaxes(0, 2).swapaxes(1, 2)


def _times_groups(matrix: Array, groups: Array) -> Array:
    """`matrix` (rows, n) times the matrix that has `groups` on its diagonal."""
    cut = matrix.reshape(len(matrix), len(groups), -1).swapaxes(0, 1)
    return (cut @ groups).swapaxes(0, 1).reshape(matrix.shape)
