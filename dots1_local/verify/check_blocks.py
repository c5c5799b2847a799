"""Every block of a file, read once: is it finite, and how far is it from the checkpoint?

All cores take pieces of a few megabytes; memory holds a handful of them per core.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import inf, prod, sqrt

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import TensorSpec
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.gguf import GGUFFile, GGUFTensor, OpenFiles, cores, role_of
from dots1_local.files.safetensors import Slice, read_exactly
from dots1_local.files.scaled import multiply_scales
from dots1_local.ggml import TYPES, to_float32
from dots1_local.progress import Progress, silent
from dots1_local.quant.encode import bad_blocks, block_bytes, decode, is_zero
from dots1_local.verify.findings import TensorCheck

__all__ = ["check_blocks"]

_PIECE = 1 << 20  # weights that are compared at a time
_PIECE_BYTES = 4 << 20  # bytes that are only checked to be finite at a time


def check_blocks(
    gguf: GGUFFile,
    checkpoint: Checkpoint | None = None,
    specs: Mapping[str, TensorSpec] | None = None,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> tuple[TensorCheck, ...]:
    """Read every tensor; compare those in `specs`, by name, with their sources in `checkpoint`.

    Raises:
        GGUFError: the file ends early or cannot be read.
        CheckpointError: a shard of the checkpoint ends early or cannot be read.
    """
    total, done, checks = sum(tensor.nbytes for tensor in gguf.tensors), 0, []
    pool = ThreadPoolExecutor(threads or cores(), thread_name_prefix="verify")
    with _Files() as files:
        try:
            for tensor in gguf.tensors:
                reader = _TensorReader(files, tensor, checkpoint, (specs or {}).get(tensor.name))
                pieces = []
                for piece in pool.map(reader.check, reader.ranges()):
                    pieces.append(piece)
                    done += piece.nbytes
                    progress(done, total, "bytes", tensor.name)
                checks.append(reader.sum_up(pieces))
        finally:
            pool.shutdown(cancel_futures=True)
    return tuple(checks)


class _Files(OpenFiles):
    """The files of the GGUF and of the checkpoint."""

    def rows(self, source: Slice, start: int, count: int) -> NDArray[np.float32]:
        """Rows of a checkpoint's tensor as float32, valid until the thread reads again."""
        width = source.shape[-1]
        raw = self.buffer("source", count * width * source.item_bytes)
        offset = source.offset + start * width * source.item_bytes
        read_exactly(self.descriptor(source.file), raw, offset, source.file)
        out = self.buffer("rows", count * width * 4).view(np.float32).reshape(count, width)
        to_float32(raw, source.dtype, out)
        multiply_scales(out, source, np.arange(start, start + count))
        return out


@dataclass(frozen=True)
class _PieceCheck:
    """What one piece of a tensor showed; `first_bad` counts blocks from the tensor's first one."""

    nbytes: int
    bad_blocks: int
    first_bad: int
    expert: int
    zero: bool
    squared_error: float = 0.0
    squared: float = 0.0
    changed: int = 0
    padding: int = 0


class _TensorReader:
    """Checks one tensor in pieces, and compares it with its sources if there is a `spec`."""

    def __init__(
        self,
        files: _Files,
        tensor: GGUFTensor,
        checkpoint: Checkpoint | None,
        spec: TensorSpec | None,
    ) -> None:
        self._files, self._tensor = files, tensor
        self._role = spec.role if spec else role_of(tensor.name) or "other"
        self._sources: list[Slice] = []
        if checkpoint and spec and tensor.type in TYPES:
            self._sources = [checkpoint.locate(source) for source in spec.sources]
        self._columns = tensor.shape[-1] if tensor.shape else 1
        rows = prod(tensor.shape[:-1])
        self._row_bytes = tensor.nbytes // max(rows, 1)
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        self._experts = max(len(self._sources) or experts, 1)
        self._expert_rows = rows // self._experts
        self._is_matrix = self._role != "norm" and len(tensor.shape) > 1 and tensor.type in TYPES

    def ranges(self) -> Iterator[range]:
        """The bytes of each piece: whole blocks of one expert, and when compared, whole rows."""
        nbytes = self._tensor.nbytes
        block = block_bytes(self._tensor.type)
        step, whole = _PIECE_BYTES // block * block, self._expert_rows * self._row_bytes
        if self._sources:
            step = max(1, _PIECE // self._columns) * self._row_bytes
        for first in range(0, nbytes, whole or 1):
            for start in range(first, first + whole, step):
                yield range(start, min(start + step, first + whole))

    def check(self, where: range) -> _PieceCheck:
        data = self._files.read(self._tensor.file, self._tensor.offset + where.start, len(where))
        kind = self._tensor.type
        bad = bad_blocks(data, kind)
        first_bad = where.start // block_bytes(kind) + int(bad[0]) if bad.size else 0
        expert = where.start // self._row_bytes // self._expert_rows
        zero = self._is_matrix and is_zero(data, TYPES[kind])
        piece = _PieceCheck(len(where), bad.size, first_bad, expert, zero)
        return self._compare(data, where, piece) if self._sources else piece

    def _compare(self, data: NDArray[np.uint8], where: range, piece: _PieceCheck) -> _PieceCheck:
        expert, start = divmod(where.start // self._row_bytes, self._expert_rows)
        source = self._sources[expert]
        kind = TYPES[self._tensor.type]
        found = decode(data.reshape(-1, self._row_bytes), kind, self._columns)
        width = source.shape[-1]
        height = source.nbytes // source.item_bytes // width
        count = max(0, min(len(found), height - start))
        right = self._files.rows(source, start, count)
        with np.errstate(all="ignore"):  # the weights may not be finite
            difference = found[:count, :width] - right
            error = np.einsum("ij,ij->i", difference, difference).sum(dtype=np.float64)
        exact = kind.name in ("F32", source.dtype)  # the type can hold every weight of the source
        return replace(
            piece,
            squared_error=float(error),
            squared=float(np.einsum("ij,ij->i", right, right).sum(dtype=np.float64)),
            changed=int(np.count_nonzero(difference)) if exact else 0,
            padding=int(np.count_nonzero(found[count:])),
        )

    def sum_up(self, pieces: list[_PieceCheck]) -> TensorCheck:
        tensor = self._tensor
        check = TensorCheck(
            tensor.name,
            self._role,
            tensor.type,
            tensor.shape,
            tensor.nbytes,
            bad_blocks=sum(piece.bad_blocks for piece in pieces),
            changed=sum(piece.changed for piece in pieces),
            padding=sum(piece.padding for piece in pieces),
            zero=_zero_experts(pieces),
        )
        if check.bad_blocks:
            first = next(piece.first_bad for piece in pieces if piece.bad_blocks)
            weights = tensor.elements * block_bytes(tensor.type) // tensor.nbytes  # in a block
            expert, row = divmod(first * weights // self._columns, self._expert_rows)
            return replace(check, bad_expert=expert, bad_row=row)
        if not self._sources:
            return check
        by_expert = [
            _relative_error([piece for piece in pieces if piece.expert == index])
            for index in range(len(self._sources))
        ]
        worst = int(np.argmax(by_expert))  # a NaN counts as the largest
        error = _relative_error(pieces)
        return replace(
            check,
            error=error,
            worst_error=by_expert[worst],
            worst_expert=worst,
            zero=tuple(expert for expert in check.zero if by_expert[expert]),
        )


def _zero_experts(pieces: list[_PieceCheck]) -> tuple[int, ...]:
    others = {piece.expert for piece in pieces if not piece.zero}
    return tuple(sorted({piece.expert for piece in pieces} - others))


def _relative_error(pieces: list[_PieceCheck]) -> float:
    """‖W − Ŵ‖ / ‖W‖; if W is zero, 0 for a Ŵ that is zero too, and infinity for any other."""
    error, norm = sum(p.squared_error for p in pieces), sum(p.squared for p in pieces)
    if norm == 0:
        return inf if error else 0.0
    return sqrt(error / norm)
