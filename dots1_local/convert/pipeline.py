"""The conversion itself: read ▸ assemble ▸ encode ▸ write, on all cores, in bounded memory.

Every core takes the next block of rows, reads it, pads it, encodes it and writes it to its place;
the kernel reads ahead and writes behind. Tensors are converted one after another, so that a kill
costs one tensor at most. Blocks are small (a million weights), so that cores hardly wait for one
another at a tensor's end, and memory holds a few megabytes per core.
"""

import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import TensorSpec
from dots1_local.convert.output import Output, TensorSlot
from dots1_local.convert.writer import Journal
from dots1_local.errors import CheckpointError, Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.gguf import cores
from dots1_local.files.gguf_header import GGUFHeader, GGUFTensor
from dots1_local.files.safetensors import Slice, read_exactly
from dots1_local.files.scaled import multiply_scales
from dots1_local.ggml import QuantType, to_float32
from dots1_local.hub.shard_supply import ShardSupply
from dots1_local.progress import Progress, silent
from dots1_local.quant.encode import bad_blocks, encode
from dots1_local.quant.importance import Importance

__all__ = ["Encoder", "EncoderName", "Pipeline", "encoder_named", "verify_layout"]

Encoder = Callable[[NDArray[np.float32], QuantType, NDArray[np.float32] | None], NDArray[np.uint8]]
EncoderName = Literal["ggml", "fast"]
"""Called with rows (n, columns), their type, and importance (columns,); returns their blocks."""

_BLOCK = 1 << 20  # weights encoded at a time
_READ_AHEAD = 16  # blocks the kernel is asked to fetch early
_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True)
class _RowBlock:
    """Rows [start, stop) of one expert; a tensor without experts is expert 0."""

    expert: int
    start: int
    stop: int


def encoder_named(name: EncoderName) -> Encoder:
    """Return the encoder of this name.

    Raises:
        Dots1Error: the kernels of the fast encoder cannot be compiled.
    """
    if name == "ggml":
        return encode
    from dots1_local.refine.fast_encoder import best_encode  # compiles the kernels

    return best_encode


class Pipeline:
    """Writes the tensors of a conversion; `run` may be called once.

    With a `supply`, tensors are converted in its order while shards are fetched and removed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        journal: Journal,
        importance: Importance | None = None,
        threads: int | None = None,
        supply: ShardSupply | None = None,
        encoder: Encoder = encode,
    ) -> None:
        self._checkpoint = checkpoint
        self._journal = journal
        self._importance = importance
        self._threads = threads or cores()
        self._supply = supply
        self._encode = encoder
        self._local = threading.local()
        self._sources: dict[Path, int] = {}

    def run(self, progress: Progress = silent, names: Collection[str] | None = None) -> None:
        """Encode and write every tensor, or those of `names`, that the journal does not hold yet.

        Raises:
            CheckpointError: a weight is NaN or infinite, or a shard ends early.
            Dots1Error: the disk fills up.
        """
        slots = self._journal.output.slots
        total = sum(slot.tensor.nbytes for slot in slots)
        left = [slot for slot in slots if slot.tensor.spec.name not in self._journal.finished]
        done = total - sum(slot.tensor.nbytes for slot in left)
        if names is not None:
            left = [slot for slot in left if slot.tensor.spec.name in names]
        supply = self._supply

        def report(what: str) -> None:
            fetched, to_fetch = (supply.received, supply.nbytes) if supply else (0, 0)
            progress(done + fetched, total + to_fetch, "bytes", what)

        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="encode")
        try:
            for slot in _in_order(left, supply) if supply else left:
                name = slot.tensor.spec.name
                if supply:
                    supply.wait(name, report)
                pieces = []
                for size, crc in self._tensor(pool, slot):
                    pieces.append((size, crc))
                    done += size
                    report(name)
                self._journal.finish(slot, pieces)
                if supply:
                    supply.finish(name, self._close)
        finally:
            pool.shutdown(cancel_futures=True)
            for fd in self._sources.values():
                os.close(fd)

    def _tensor(self, pool: ThreadPoolExecutor, slot: TensorSlot) -> Iterator[tuple[int, int]]:
        spec = slot.tensor.spec
        weights = self._importance.for_tensor(spec) if self._importance else None
        blocks = list(_blocks(spec))
        futures: list[Future[tuple[int, int]]] = []
        for index, block in enumerate(blocks):
            first = index + _READ_AHEAD if index else 0
            ahead = blocks[first : index + _READ_AHEAD + 1]
            futures.append(pool.submit(self._do, slot, block, weights, ahead))
        for future in futures:
            yield future.result()

    def _do(
        self,
        slot: TensorSlot,
        block: _RowBlock,
        weights: NDArray[np.float32] | None,
        ahead: Sequence[_RowBlock],
    ) -> tuple[int, int]:
        tensor = slot.tensor
        for later in ahead:
            self._prefetch(tensor.spec, later)
        rows = self._rows(tensor.spec, block)
        _check_finite(rows, tensor.spec, block)
        importance = None if weights is None else weights[block.expert]
        data = self._encode(rows, tensor.kind, importance)
        if bad_blocks(data, tensor.kind.name).size:
            raise CheckpointError(
                f"{tensor.spec.sources[block.expert]} has weights that are too large for "
                f"{tensor.kind.name}; give it another type with --tensor-type, such as BF16"
            )
        rows_per_expert = tensor.spec.rows // len(tensor.spec.sources)
        first = block.expert * rows_per_expert + block.start
        return self._journal.write(slot, data, first * tensor.row_bytes)

    def _rows(self, spec: TensorSpec, block: _RowBlock) -> NDArray[np.float32]:
        """Read a block as float32, padded with zeros to the tensor's width and height."""
        source = self._checkpoint.locate(spec.sources[block.expert])
        columns = source.shape[-1]
        rows = source.shape[0] if len(source.shape) > 1 else 1
        count = max(min(block.stop, rows) - block.start, 0)
        out = self._buffer("rows", (block.stop - block.start, spec.columns), np.float32)
        if count == len(out) and columns == spec.columns:
            self._read(source, block.start, count, out)
            return out
        out[:] = 0
        if count:
            unpadded = self._buffer("unpadded", (count, columns), np.float32)
            self._read(source, block.start, count, unpadded)
            out[:count, :columns] = unpadded
        return out

    def _read(self, source: Slice, start: int, count: int, out: NDArray[np.float32]) -> None:
        row = source.shape[-1] * source.item_bytes
        raw = self._buffer("raw", (count * row,), np.uint8)
        fd = self._open(source.file)
        read_exactly(fd, raw, source.offset + start * row, source.file)
        to_float32(raw, source.dtype, out)
        multiply_scales(out, source, np.arange(start, start + count))

    def _prefetch(self, spec: TensorSpec, block: _RowBlock) -> None:
        source = self._checkpoint.locate(spec.sources[block.expert])
        row = source.shape[-1] * source.item_bytes
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(
                self._open(source.file),
                source.offset + block.start * row,
                (block.stop - block.start) * row,
                os.POSIX_FADV_WILLNEED,
            )

    def _open(self, path: Path) -> int:
        """Return a shared descriptor; if two threads race, the dictionary keeps one of two."""
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
        """Return scratch memory that a thread keeps from block to block."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        held: NDArray[np.uint8] | None = getattr(self._local, name, None)
        if held is None or held.size < size:
            held = np.empty(size, np.uint8)
            setattr(self._local, name, held)
        return held[:size].view(dtype).reshape(shape)


def _in_order(slots: Sequence[TensorSlot], supply: ShardSupply) -> list[TensorSlot]:
    """The slots in the order in which the supply brings their tensors' shards."""
    return sorted(slots, key=lambda slot: supply.step(slot.tensor.spec.name))


def _blocks(spec: TensorSpec) -> Iterator[_RowBlock]:
    rows = spec.rows // len(spec.sources)
    step = max(1, _BLOCK // spec.columns)
    for expert in range(len(spec.sources)):
        for start in range(0, rows, step):
            yield _RowBlock(expert, start, min(start + step, rows))


def _check_finite(rows: NDArray[np.float32], spec: TensorSpec, block: _RowBlock) -> None:
    """Refuse NaN and infinity; they show in the sum, which is far cheaper than a check of each."""
    with np.errstate(all="ignore"):
        suspicious = not np.isfinite(rows.sum())
    if suspicious and not np.isfinite(rows).all():
        bad = int(np.argmin(np.isfinite(rows).all(axis=1)))
        raise CheckpointError(
            f"{spec.sources[block.expert]} has NaN or infinite weights in row {block.start + bad}; "
            "the checkpoint is damaged"
        )


def verify_layout(output: Output) -> None:
    """Read headers back, and compare name, type, shape, place and size of every tensor.

    Raises:
        Dots1Error: a header differs; another program wrote to the file.
    """
    for index, (partial, size) in enumerate(zip(output.partials, output.sizes, strict=True)):
        found = GGUFHeader.read(partial).tensors
        intact = partial.stat().st_size == size
        if not intact or found != tuple(_expected(output, index)):
            raise Dots1Error(
                f"{partial} differs from what was written; delete it and convert again"
            )


def _expected(output: Output, file: int) -> Iterator[GGUFTensor]:
    for slot in output.slots:
        if slot.file == file:
            spec, kind = slot.tensor.spec, slot.tensor.kind.name
            partial, nbytes = output.partials[file], slot.tensor.nbytes
            yield GGUFTensor(spec.name, kind, spec.shape, partial, slot.offset, nbytes)
