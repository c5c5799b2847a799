"""One matrix of a tensor, or some of its rows: read, refined, padded, checked."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import TensorSpec
from dots1_local.calibrate.output_errors import read_rows
from dots1_local.convert.output import TensorSlot
from dots1_local.convert.refined_results import MatrixResult
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.quant.encode import bad_blocks, encode
from dots1_local.refine.arrays import Arrays
from dots1_local.refine.matrix import ROUNDS, refine_matrix
from dots1_local.refine.metric import Metric

__all__ = ["Encoded", "Piece", "pieces_of"]

_PIECE = 1 << 22  # weights of a matrix that are refined together where rows are not coupled

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of one source of a tensor: piece `number` of `count` pieces."""

    slot: TensorSlot
    number: int
    count: int
    source: str
    start: int
    stop: int

    def refine(
        self,
        checkpoint: Checkpoint,
        metric: Metric,
        held_out: Floats | None,
        importance: Floats | None,
        arrays: Arrays,
    ) -> "Encoded":
        """Refine the rows; `importance` (sources, columns) is what ggml's encoder gets.

        Raises:
            CheckpointError: weights are NaN, infinite, or too large for the type.
        """
        kind, spec = self.slot.tensor.kind, self.slot.tensor.spec
        weights = read_rows(checkpoint, self.source, np.arange(self.start, self.stop))
        own = None if importance is None else importance[spec.sources.index(self.source)]
        refined = refine_matrix(
            weights,
            kind,
            metric,
            held_out,
            columns=spec.columns,
            importance=None if own is None else own[: weights.shape[1]],
            rounds=ROUNDS,
            arrays=arrays,
        )
        if bad_blocks(refined.data, kind.name).size:
            raise CheckpointError(
                f"{self.source} has weights that are too large for {kind.name}; give it another "
                "type with --tensor-type, such as BF16"
            )
        held = None if math.isnan(refined.held_out) else refined.held_out
        result = MatrixResult(len(weights), refined.kept, refined.fitted, held)
        return Encoded(self, self._padded(refined.data), result)

    @property
    def tensor(self) -> str:
        """The name of the tensor."""
        return self.slot.tensor.spec.name

    @property
    def offset(self) -> int:
        """Bytes from the beginning of the tensor to the piece."""
        spec = self.slot.tensor.spec
        first = spec.sources.index(self.source) * _stored_rows(spec) + self.start
        return first * self.slot.tensor.row_bytes

    def _padded(self, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Append zero rows to the last rows of a source whose stored tensor is higher."""
        spec, kind = self.slot.tensor.spec, self.slot.tensor.kind
        missing = _stored_rows(spec) - self.stop if self.stop == spec.source_shape[0] else 0
        if not missing:
            return data
        ones = np.ones(spec.columns, np.float32)  # types that need importance get some
        zeros = encode(np.zeros((1, spec.columns), np.float32), kind, ones)
        return np.concatenate([data, np.repeat(zeros, missing, axis=0)])


@dataclass(frozen=True)
class Encoded:
    """The blocks (rows, row_bytes) of a piece, with padded rows."""

    piece: Piece
    data: NDArray[np.uint8]
    result: MatrixResult


def pieces_of(slot: TensorSlot, *, whole: bool) -> list[Piece]:
    """Return the pieces of a tensor: its experts, or rows of its matrix, or the `whole` matrix."""
    spec = slot.tensor.spec
    rows, columns = spec.source_shape
    step = rows if whole or spec.role == "routed" else max(1, _PIECE // columns)
    starts = [(source, start) for source in spec.sources for start in range(0, rows, step)]
    return [
        Piece(slot, number, len(starts), source, start, min(start + step, rows))
        for number, (source, start) in enumerate(starts)
    ]


def _stored_rows(spec: TensorSpec) -> int:
    """The rows of each source in the stored tensor."""
    return spec.rows // len(spec.sources)
