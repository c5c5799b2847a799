"""The conversion itself: read ▸ assemble ▸ encode ▸ write, on all cores, in bounded memory.

Every core takes the next piece of rows, reads it, pads it, encodes it and writes it where it
belongs; the kernel reads ahead and writes behind. Tensors go one after another, so that whatever
kills the run costs one tensor at most; pieces are small (a million weights), so that cores hardly
wait for one another at a tensor's end, and memory holds a few megabytes per core.

Does a finished file say what was decided? Its header is read back and compared.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import TensorSpec
from dots1_local.convert.from_hub import ShardSupply
from dots1_local.convert.writer import Journal, Output, Slot
from dots1_local.errors import CheckpointError, Dots1Error
from dots1_local.files.checkpoint import Checkpoint, Slice, read_exactly
from dots1_local.files.gguf import cores
from dots1_local.files.gguf_header import GGUFHeader, GGUFTensor
from dots1_local.ggml import to_float32
from dots1_local.progress import Progress, silent
from dots1_local.quant.encode import encode, is_valid
from dots1_local.quant.importance import Importance

__all__ = [
    "Pipeline",
    "verify_layout",
]


_PIECE = 1 << 20  # weights encoded at a time
_READ_AHEAD = 16  # pieces the kernel is asked to fetch early
_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True)
class _Piece:
    """Rows [start, stop) of one expert (or of a plain tensor, expert 0)."""

    expert: int
    start: int
    stop: int


class Pipeline:
    """Carries a laid-out conversion to its end; `run` may be called once.

    With a `supply`, shards come and go while tensors are converted in its order.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        journal: Journal,
        importance: Importance | None = None,
        threads: int | None = None,
        supply: ShardSupply | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._journal = journal
        self._importance = importance
        self._threads = threads or cores()
        self._supply = supply
        self._local = threading.local()
        self._sources: dict[Path, int] = {}

    def run(self, progress: Progress = silent) -> None:
        """Encode and write every tensor that the journal does not already hold.

        Raises:
            CheckpointError: a weight is NaN or infinite, or a shard ends early.
            Dots1Error: the disk fills up.
        """
        slots = self._journal.output.slots
        total = sum(slot.tensor.nbytes for slot in slots)
        left = [slot for slot in slots if slot.tensor.spec.name not in self._journal.done]
        done = total - sum(slot.tensor.nbytes for slot in left)
        supply = self._supply

        def report(what: str) -> None:
            fetched, to_fetch = (supply.received, supply.nbytes) if supply else (0, 0)
            progress(done + fetched, total + to_fetch, "bytes", what)

        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="encode")
        try:
            for slot in supply.in_order(left) if supply else left:
                if supply:
                    supply.wait(slot, report)
                pieces = []
                for size, crc in self._tensor(pool, slot):
                    pieces.append((size, crc))
                    done += size
                    report(slot.tensor.spec.name)
                self._journal.finish(slot, pieces)
                if supply:
                    supply.finish(slot, self._close)
        finally:
            pool.shutdown(cancel_futures=True)
            for fd in self._sources.values():
                os.close(fd)

    def _tensor(self, pool: ThreadPoolExecutor, slot: Slot) -> Iterator[tuple[int, int]]:
        spec = slot.tensor.spec
        weights = self._importance.for_tensor(spec) if self._importance else None
        pieces = list(_pieces(spec))
        futures: list[Future[tuple[int, int]]] = []
        for index, piece in enumerate(pieces):
            first = index + _READ_AHEAD if index else 0
            ahead = pieces[first : index + _READ_AHEAD + 1]
            futures.append(pool.submit(self._do, slot, piece, weights, ahead))
        for future in futures:
            yield future.result()

    def _do(
        self,
        slot: Slot,
        piece: _Piece,
        weights: NDArray[np.float32] | None,
        ahead: Sequence[_Piece],
    ) -> tuple[int, int]:
        tensor = slot.tensor
        for later in ahead:
            self._prefetch(tensor.spec, later)
        rows = self._rows(tensor.spec, piece)
        _check_finite(rows, tensor.spec, piece)
        importance = None if weights is None else weights[piece.expert]
        data = encode(rows, tensor.kind, importance)
        if not is_valid(data, tensor.kind):
            raise CheckpointError(
                f"{tensor.spec.sources[piece.expert]} has weights larger than {tensor.kind.name} "
                "holds; give the tensor another type with --tensor-type, such as BF16"
            )
        rows_per_expert = tensor.spec.rows // len(tensor.spec.sources)
        first = piece.expert * rows_per_expert + piece.start
        return self._journal.write(slot, data, first * tensor.row_bytes)

    def _rows(self, spec: TensorSpec, piece: _Piece) -> NDArray[np.float32]:
        """The piece as float32, zeros where the tensor is wider or taller than its source."""
        source = self._checkpoint.locate(spec.sources[piece.expert])
        columns = source.shape[-1]
        stop = min(piece.stop, _row_count(source))
        count = max(stop - piece.start, 0)
        out = self._buffer("rows", (piece.stop - piece.start, spec.columns), np.float32)
        if count == len(out) and columns == spec.columns:
            self._read(source, piece.start, count, out)
            return out
        out[:] = 0
        if count:
            unpadded = self._buffer("unpadded", (count, columns), np.float32)
            self._read(source, piece.start, count, unpadded)
            out[:count, :columns] = unpadded
        return out

    def _read(self, source: Slice, start: int, count: int, out: NDArray[np.float32]) -> None:
        row = source.shape[-1] * source.item_bytes
        raw = self._buffer("raw", (count * row,), np.uint8)
        fd = self._open(source.file)
        read_exactly(fd, raw, source.offset + start * row, source.file)
        to_float32(raw, source.dtype, out)

    def _prefetch(self, spec: TensorSpec, piece: _Piece) -> None:
        source = self._checkpoint.locate(spec.sources[piece.expert])
        row = source.shape[-1] * source.item_bytes
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(
                self._open(source.file),
                source.offset + piece.start * row,
                (piece.stop - piece.start) * row,
                os.POSIX_FADV_WILLNEED,
            )

    def _open(self, path: Path) -> int:
        """A shared descriptor; if two threads race, the dictionary keeps one and both work."""
        fd = self._sources.get(path)
        if fd is None:
            try:
                opened = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
            fd = self._sources.setdefault(path, opened)
            if fd != opened:
                os.close(opened)
        return fd

    def _close(self, path: Path) -> None:
        fd = self._sources.pop(path, None)
        if fd is not None:
            os.close(fd)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: type[_Scalar]) -> NDArray[_Scalar]:
        """Scratch memory that a thread keeps from piece to piece."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        held: NDArray[np.uint8] | None = getattr(self._local, name, None)
        if held is None or held.size < size:
            held = np.empty(size, np.uint8)
            setattr(self._local, name, held)
        return held[:size].view(dtype).reshape(shape)


def _row_count(source: Slice) -> int:
    return source.shape[0] if len(source.shape) > 1 else 1


def _pieces(spec: TensorSpec) -> Iterator[_Piece]:
    rows = spec.rows // len(spec.sources)
    step = max(1, _PIECE // spec.columns)
    for expert in range(len(spec.sources)):
        for start in range(0, rows, step):
            yield _Piece(expert, start, min(start + step, rows))


def _check_finite(rows: NDArray[np.float32], spec: TensorSpec, piece: _Piece) -> None:
    """A NaN or Inf shows in the sum, which is far cheaper than looking at every weight."""
    with np.errstate(all="ignore"):
        suspicious = not np.isfinite(rows.sum())
    if suspicious and not np.isfinite(rows).all():
        bad = int(np.argmin(np.isfinite(rows).all(axis=1)))
        raise CheckpointError(
            f"{spec.sources[piece.expert]} has NaN or infinite weights in row {piece.start + bad}; "
            "the checkpoint is damaged"
        )


def verify_layout(output: Output) -> None:
    """Compare name, type, shape, place and size of every tensor with what was laid out.

    Raises:
        Dots1Error: they differ; something else wrote to the file.
    """
    for index, (partial, size) in enumerate(zip(output.partials, output.sizes, strict=True)):
        found = GGUFHeader.read(partial).tensors
        intact = partial.stat().st_size == size
        if not intact or found != tuple(_expected(output, index)):
            raise Dots1Error(
                f"{partial} does not hold what was written; delete it and convert again"
            )


def _expected(output: Output, file: int) -> Iterator[GGUFTensor]:
    for slot in output.slots:
        if slot.file == file:
            spec, kind = slot.tensor.spec, slot.tensor.kind.name
            partial, nbytes = output.partials[file], slot.tensor.nbytes
            yield GGUFTensor(spec.name, kind, spec.shape, partial, slot.offset, nbytes)
