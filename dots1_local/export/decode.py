"""Writing shards: read ▸ decode ▸ cut off padding ▸ round ▸ write, on all cores.

A core works on a million weights at a time, so memory holds a few megabytes per core.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import GGUFError
from dots1_local.export.folder import ExportFolder
from dots1_local.export.shards import ExportedTensor, Shard
from dots1_local.files.gguf import OpenFiles, cores
from dots1_local.files.partial_file import write_all
from dots1_local.ggml import TYPES
from dots1_local.progress import Progress, silent
from dots1_local.quant.encode import bad_blocks, decode, encode

__all__ = ["write_shards"]

_PIECE = 1 << 20  # weights decoded at a time


@dataclass(frozen=True)
class _RowRange:
    """Rows [start, stop) of a tensor, which go to `offset` of its shard."""

    tensor: ExportedTensor
    start: int
    stop: int
    offset: int


def write_shards(
    folder: ExportFolder,
    shards: tuple[Shard, ...],
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> None:
    """Write the shards that the folder does not hold yet.

    Raises:
        GGUFError: a weight is not finite or is too large for BF16, or the file ends early.
        Dots1Error: the disk is full.
    """
    total = sum(shard.nbytes for shard in shards)
    done = sum(shard.nbytes for shard in shards if shard.name in folder.done)
    pool = ThreadPoolExecutor(threads or cores(), thread_name_prefix="export")
    with OpenFiles() as files:

        def fill(shard: Shard, fd: int) -> None:
            nonlocal done
            done += len(shard.header)
            pieces = list(_pieces(shard))
            written = pool.map(partial(_write, files, fd), pieces)
            for piece, nbytes in zip(pieces, written, strict=True):
                done += nbytes
                progress(done, total, "bytes", piece.tensor.name)

        try:
            for shard in shards:
                if shard.name not in folder.done:
                    folder.write(shard, partial(fill, shard))
        finally:
            pool.shutdown(cancel_futures=True)


def _pieces(shard: Shard) -> Iterator[_RowRange]:
    for tensor, offset in shard.tensors:
        step = max(1, _PIECE // tensor.columns)
        row_bytes = tensor.columns * tensor.kind.bytes
        for start in range(0, tensor.rows, step):
            stop = min(start + step, tensor.rows)
            yield _RowRange(tensor, start, stop, offset + start * row_bytes)


def _write(files: OpenFiles, fd: int, piece: _RowRange) -> int:
    """Write one range of rows; return the number of bytes."""
    kind, rows = piece.tensor.kind, _rows(files, piece)
    out = files.buffer("rounded", rows.size * kind.bytes).reshape(len(rows), -1)
    data = encode(rows, kind, out=out)
    if bad_blocks(data, kind.name).size:  # F32 reaches a little further than BF16
        raise GGUFError(f"{_where(piece)} has weights beyond the range of BF16")
    write_all(fd, data.reshape(-1).data, piece.offset)
    return data.nbytes


def _rows(files: OpenFiles, piece: _RowRange) -> NDArray[np.float32]:
    """The decoded rows, without padding."""
    tensor, stored = piece.tensor, piece.tensor.stored
    kind, columns = TYPES[stored.type], stored.shape[-1]
    row_bytes = kind.row_bytes(columns)
    offset = stored.offset + (tensor.first_row + piece.start) * row_bytes
    data = files.read(stored.file, offset, (piece.stop - piece.start) * row_bytes)
    if bad_blocks(data, stored.type).size:
        raise GGUFError(
            f"{_where(piece)} has NaN or infinite weights, or illegal codes; the file is damaged, "
            "and dots1 verify says where"
        )
    rows = decode(data.reshape(-1, row_bytes), kind, columns)
    return np.ascontiguousarray(rows[:, : tensor.columns])


def _where(piece: _RowRange) -> str:
    stored = piece.tensor.stored
    return f"{stored.name} of {stored.file} ({piece.tensor.name})"
