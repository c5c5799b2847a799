"""Which blocks do not decode to finite numbers, told from their scales alone.

Whatever else a block holds is a small integer, so its weights are finite if its 16-bit scales
are: the largest is 65504 times a few thousand. MXFP4's scale is a power of two up to 2^127, and
from 2^126 on a weight may overflow. ggml has the same check, but it prints to stderr.

Every block of a file, read once: is it finite, and how far is it from the checkpoint?

All cores take pieces of a few megabytes; memory holds a handful of them per core.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import inf, prod, sqrt

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import TensorSpec
from dots1_local.files.checkpoint import Checkpoint, Slice, read_exactly
from dots1_local.files.file_pool import OpenFiles, cores
from dots1_local.files.gguf import GGUFFile, GGUFTensor, role_of
from dots1_local.ggml import TYPES, to_float32
from dots1_local.progress import Progress, silent
from dots1_local.quant.encode import decode
from dots1_local.verify.findings import TensorCheck

__all__ = [
    "bad_blocks",
    "block_bytes",
    "examine",
    "is_exact",
]


# Bytes of a block, and where in it float16 scales lie.
_SCALES = {
    "Q4_0": (18, 0), "Q4_1": (20, 0, 2), "Q5_0": (22, 0), "Q5_1": (24, 0, 2), "Q8_0": (34, 0),
    "Q2_K": (84, 80, 82), "Q3_K": (110, 108), "Q4_K": (144, 0, 2), "Q5_K": (176, 0, 2),
    "Q6_K": (210, 208), "IQ1_S": (50, 0), "IQ2_XXS": (66, 0), "IQ2_XS": (74, 0), "IQ2_S": (82, 0),
    "IQ3_XXS": (98, 0), "IQ3_S": (110, 0), "IQ4_NL": (18, 0), "IQ4_XS": (136, 0),
    "TQ1_0": (54, 52), "TQ2_0": (66, 64), "Q1_0": (18, 0), "Q2_0": (18, 0), "F16": (2, 0),
}  # fmt: skip
_SIZES = {"BF16": 2, "F32": 4, "F64": 8, "MXFP4": 17, "IQ1_M": 56}
# Integers are always finite, and so are NVFP4's 8-bit scales as ggml decodes them.
_ALWAYS = ("I8", "I16", "I32", "I64", "NVFP4")


def block_bytes(kind: str) -> int:
    """Bytes of a block of `kind`; 1 for those that are always finite."""
    return _SCALES[kind][0] if kind in _SCALES else _SIZES.get(kind, 1)


def bad_blocks(data: NDArray[np.uint8], kind: str) -> NDArray[np.intp]:
    """The blocks of contiguous `data` that hold a NaN or an infinity, by their place in it."""
    if kind in _ALWAYS:
        return np.empty(0, np.intp)
    if kind in _SCALES:
        size, *places = _SCALES[kind]
        blocks = data.reshape(-1, size)
        bad = _is_special(blocks, places[0])
        for place in places[1:]:
            bad |= _is_special(blocks, place)
    else:
        bad = _OTHERS[kind](data)
    return np.flatnonzero(bad)


def _is_special(blocks: NDArray[np.uint8], place: int) -> NDArray[np.bool_]:
    """Whether the float16 at `place` of each block has all bits of its exponent set."""
    special: NDArray[np.bool_] = (blocks[:, place + 1] & 0x7C) == 0x7C
    return special


def _bf16(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    bad: NDArray[np.bool_] = (data.view(np.uint16) & 0x7F80) == 0x7F80
    return bad


def _f32(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return ~np.isfinite(data.view(np.float32))


def _f64(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return ~np.isfinite(data.view(np.float64))


def _mxfp4(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    bad: NDArray[np.bool_] = data.reshape(-1, 17)[:, 0] >= 253  # weights of up to 12 × 2^(e - 128)
    return bad


def _iq1_m(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Its scale is spread over the top four bits of four 16-bit words at the block's end."""
    blocks = data.reshape(-1, 56)
    bad: NDArray[np.bool_] = ((blocks[:, 53] & 0xC0) == 0xC0) & ((blocks[:, 55] & 0x70) == 0x70)
    return bad


_OTHERS = {"BF16": _bf16, "F32": _f32, "F64": _f64, "MXFP4": _mxfp4, "IQ1_M": _iq1_m}


_PIECE = 1 << 20  # weights compared at a time
_PIECE_BYTES = 4 << 20  # looked at for finiteness at a time


@dataclass(frozen=True)
class _Part:
    """What one piece came to; `first_bad` is counted from the tensor's first block."""

    nbytes: int
    bad_blocks: int
    first_bad: int
    expert: int = 0
    squared_error: float = 0.0
    squared: float = 0.0
    changed: int = 0
    padding: int = 0


def is_exact(kind: str, dtype: str) -> bool:
    """Whether a tensor of `kind` holds every weight that safetensors' `dtype` does."""
    return kind in ("F32", dtype)


def examine(
    gguf: GGUFFile,
    checkpoint: Checkpoint | None = None,
    specs: Mapping[str, TensorSpec] | None = None,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> tuple[TensorCheck, ...]:
    """Look at every tensor; compare those in `specs`, by name, with their sources.

    Raises:
        GGUFError: the file ends early or cannot be read.
        CheckpointError: the same of a shard of the checkpoint.
    """
    total, done, checks = sum(tensor.nbytes for tensor in gguf.tensors), 0, []
    pool = ThreadPoolExecutor(threads or cores(), thread_name_prefix="examine")
    with _Files() as files:
        try:
            for tensor in gguf.tensors:
                reader = _Tensor(files, tensor, checkpoint, (specs or {}).get(tensor.name))
                parts = []
                for part in pool.map(reader.look, reader.ranges()):
                    parts.append(part)
                    done += part.nbytes
                    progress(done, total, "bytes", tensor.name)
                checks.append(reader.sum_up(parts))
        finally:
            pool.shutdown(cancel_futures=True)
    return tuple(checks)


class _Tensor:
    """One tensor; compared with its sources if there is a `spec`."""

    def __init__(
        self,
        files: "_Files",
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
        self._rows = prod(tensor.shape[:-1])
        self._row_bytes = tensor.nbytes // max(self._rows, 1)
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        self._part_rows = self._rows // max(len(self._sources) or experts, 1)

    def ranges(self) -> Iterator[range]:
        """Bytes to look at together: whole blocks, and rows of one source where compared."""
        nbytes = self._tensor.nbytes
        block = block_bytes(self._tensor.type)
        step, whole = _PIECE_BYTES // block * block, nbytes
        if self._sources:
            step = max(1, _PIECE // self._columns) * self._row_bytes
            whole = self._part_rows * self._row_bytes
        for first in range(0, nbytes, whole or 1):
            for start in range(first, first + whole, step):
                yield range(start, min(start + step, first + whole))

    def look(self, where: range) -> _Part:
        data = self._files.read(self._tensor.file, self._tensor.offset + where.start, len(where))
        kind = self._tensor.type
        bad = bad_blocks(data, kind)
        first_bad = where.start // block_bytes(kind) + int(bad[0]) if bad.size else 0
        part = _Part(len(where), bad.size, first_bad)
        return self._compare(data, where, part) if self._sources else part

    def _compare(self, data: NDArray[np.uint8], where: range, part: _Part) -> _Part:
        expert, start = divmod(where.start // self._row_bytes, self._part_rows)
        source = self._sources[expert]
        kind = TYPES[self._tensor.type]
        found = decode(data.reshape(-1, self._row_bytes), kind, self._columns)
        width = source.shape[-1]
        height = source.nbytes // source.item_bytes // width
        count = max(0, min(len(found), height - start))
        right = self._files.rows(source, start, count)
        with np.errstate(all="ignore"):  # of what is not finite
            difference = found[:count, :width] - right
            error = np.einsum("ij,ij->i", difference, difference).sum(dtype=np.float64)
        exact = is_exact(kind.name, source.dtype)
        return replace(
            part,
            expert=expert,
            squared_error=float(error),
            squared=float(np.einsum("ij,ij->i", right, right).sum(dtype=np.float64)),
            changed=int(np.count_nonzero(difference)) if exact else 0,
            padding=int(np.count_nonzero(found[count:])),
        )

    def sum_up(self, parts: list[_Part]) -> TensorCheck:
        tensor = self._tensor
        bad = [part.first_bad for part in parts if part.bad_blocks]
        weights = tensor.elements * block_bytes(tensor.type) // max(tensor.nbytes, 1)
        row = bad[0] * weights // self._columns if bad else 0
        expert, row = divmod(row, self._part_rows) if bad else (0, 0)
        error = worst = None
        worst_expert = 0
        if self._sources and not bad:
            error = _relative(parts)
            by_expert = [
                _relative([part for part in parts if part.expert == index])
                for index in range(len(self._sources))
            ]
            worst_expert = int(np.argmax(by_expert))  # a NaN counts as the largest
            worst = by_expert[worst_expert]
        return TensorCheck(
            tensor.name,
            self._role,
            tensor.type,
            tensor.shape,
            tensor.nbytes,
            sum(part.bad_blocks for part in parts),
            expert,
            row,
            error,
            worst,
            worst_expert,
            sum(part.changed for part in parts),
            sum(part.padding for part in parts),
        )


def _relative(parts: list[_Part]) -> float:
    """‖W − Ŵ‖ / ‖W‖; of zeros, infinite unless they are still zeros."""
    error, norm = sum(p.squared_error for p in parts), sum(p.squared for p in parts)
    if norm == 0:
        return inf if error else 0.0
    return sqrt(error / norm)


class _Files(OpenFiles):
    """The GGUF's files and the checkpoint's."""

    def rows(self, source: Slice, start: int, count: int) -> NDArray[np.float32]:
        """Rows of a checkpoint's tensor as float32, valid until the thread reads again."""
        width = source.shape[-1]
        raw = self.buffer("source", count * width * source.item_bytes)
        offset = source.offset + start * width * source.item_bytes
        read_exactly(self.descriptor(source.file), raw, offset, source.file)
        out = self.buffer("rows", count * width * 4).view(np.float32).reshape(count, width)
        to_float32(raw, source.dtype, out)
        return out
