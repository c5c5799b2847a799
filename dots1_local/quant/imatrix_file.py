"""llama.cpp's importance files: where in them each tensor's sums lie, and writing new ones.

Two forms exist. In the GGUF form a tensor NAME has `NAME.in_sum2`, the squared activations summed
per column, and `NAME.counts`, the tokens that went into them: one count, or one per expert. The
older .dat form has sums that are already divided by the tokens and multiplied by `ncall`, and
says nothing about single experts.

Lengths, sums and counts are checked before they are used: these files get shared.
"""

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeGuard

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import Dots1Error
from dots1_local.files.gguf import GGUFTensor, read_header
from dots1_local.files.partial_file import open_partial

__all__ = ["Entry", "ImatrixFile", "read_index", "read_sums", "write_gguf"]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_ALIGNMENT = 32
# More tokens than anyone calibrates on; llama.cpp's own conversion to integers overflows later.
_MAX_COUNT = 2.0**53
_MAX_NAME = 4096
# 128 experts of 4096 columns are 2^19; a sparse file could claim any number.
_MAX_VALUES = 1 << 26


@dataclass(frozen=True)
class Entry:
    """One tensor's data: `values` float32 sums at `offset`, in as many equal parts as `counts`."""

    offset: int
    values: int
    counts: NDArray[np.float32]


@dataclass(frozen=True)
class ImatrixFile:
    """The index of an importance file. `chunk_size` is in tokens, and 0 in the .dat form."""

    path: Path
    legacy: bool
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int


def read_index(path: Path) -> ImatrixFile:
    """Read everything but the sums.

    Raises:
        Dots1Error: the file is missing, truncated, corrupt, or no importance file.
    """
    try:
        with path.open("rb") as file:
            legacy = file.read(4) != b"GGUF"
            file.seek(0)
            index = _read_dat(path, file) if legacy else _read_gguf(path, file)
    except OSError as error:
        raise Dots1Error(f"cannot read {path}: {error.strerror}") from error
    if not index.entries:
        raise Dots1Error(f"{path} holds no importance data")
    return index


def read_sums(index: ImatrixFile, name: str) -> NDArray[np.float32]:
    """The sums of a tensor, (parts, columns)."""
    entry = index.entries[name]
    with index.path.open("rb") as file:
        file.seek(entry.offset)
        raw = file.read(entry.values * 4)
    if len(raw) < entry.values * 4:
        raise Dots1Error(f"{index.path} got shorter while it was read")
    return np.frombuffer(raw, "<f4").reshape(len(entry.counts), -1)


def _read_gguf(path: Path, file: BinaryIO) -> ImatrixFile:
    keys, table = read_header(path)
    chunks, chunk_size, datasets = (keys.get(key) for key in (_CHUNKS, _CHUNK_SIZE, _DATASETS))
    if not (_is_count(chunks) and _is_count(chunk_size) and isinstance(datasets, list)):
        raise Dots1Error(
            f"{path} is no importance file: it lacks {_DATASETS}, {_CHUNKS} or {_CHUNK_SIZE}"
        )
    tensors = {tensor.name: tensor for tensor in table}
    names = sorted(
        {name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)}
        | {name.removesuffix(_COUNTS) for name in tensors if name.endswith(_COUNTS)}
    )
    entries = {name: _gguf_entry(path, file, name, tensors) for name in names}
    return ImatrixFile(path, False, entries, tuple(map(str, datasets)), chunks, chunk_size)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and 0 <= value < 1 << 32


def _gguf_entry(path: Path, file: BinaryIO, name: str, tensors: Mapping[str, GGUFTensor]) -> Entry:
    sums, counts = tensors.get(name + _SUMS), tensors.get(name + _COUNTS)
    if sums is None or counts is None:
        raise Dots1Error(f"{path}: {name} has sums without counts or counts without sums")
    if sums.type != "F32" or counts.type != "F32":
        raise Dots1Error(f"{path}: the sums and counts of {name} must be F32")
    values, parts = sums.nbytes // 4, counts.nbytes // 4
    if not parts or not 0 < values <= _MAX_VALUES or values % parts:
        raise Dots1Error(f"{path}: {name} has {values} sums for {parts} counts")
    file.seek(counts.offset)
    return Entry(sums.offset, values, _checked_counts(path, name, file.read(counts.nbytes)))


def _checked_counts(path: Path, name: str, raw: bytes) -> NDArray[np.float32]:
    counts = np.frombuffer(raw, "<f4").astype(np.float64)
    if not np.all((counts >= 0) & (counts < _MAX_COUNT)):
        raise Dots1Error(f"{path}: {name} has a count that is negative, too large or no number")
    # As llama.cpp does: to the nearest integer, halves away from zero.
    return np.floor(counts + 0.5).astype(np.float32)


def _read_dat(path: Path, file: BinaryIO) -> ImatrixFile:
    reader = _DatReader(path, file)
    entries: dict[str, Entry] = {}
    for _ in range(reader.integer("number of tensors", least=1)):
        name = reader.name()
        if name in entries:
            raise Dots1Error(f"{path}: {name} comes twice")
        calls = reader.integer(f"ncall of {name}", least=0)
        values = reader.integer(f"number of values of {name}", least=1, most=_MAX_VALUES)
        entries[name] = Entry(reader.skip(name, values * 4), values, np.array([calls], np.float32))
    chunks, datasets = reader.trailer()
    return ImatrixFile(path, True, entries, datasets, chunks, 0)


class _DatReader:
    """A cursor over a .dat file: little-endian int32, names and floats, all unaligned."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.left = os.fstat(file.fileno()).st_size

    def integer(self, what: str, least: int, most: int = 2**31 - 1) -> int:
        value: int = struct.unpack("<i", self.take(what, 4))[0]
        if not least <= value <= most:
            raise Dots1Error(f"{self.path} is no importance file, or corrupt: {what} is {value}")
        return value

    def name(self) -> str:
        length = self.integer("length of a name", least=1, most=_MAX_NAME)
        return self.take("a name", length).decode(errors="replace")

    def skip(self, name: str, length: int) -> int:
        """Pass over the values of a tensor and return where they begin."""
        offset = self.file.tell()
        self.check(f"the values of {name}", length)
        self.file.seek(length, os.SEEK_CUR)
        return offset

    def trailer(self) -> tuple[int, tuple[str, ...]]:
        """Chunk count and dataset at the end, which old files lack."""
        if self.left < 4:
            return 0, ()
        chunks = self.integer("chunk count", least=0)
        if self.left < 4:
            return chunks, ()
        length = self.integer("length of the dataset name", least=0)
        dataset = self.take("the dataset name", length).decode(errors="replace")
        return chunks, (dataset,) if dataset else ()

    def take(self, what: str, length: int) -> bytes:
        self.check(what, length)
        return self.file.read(length)

    def check(self, what: str, length: int) -> None:
        if length > self.left:
            raise Dots1Error(f"{self.path} ends before {what}; make or fetch it again")
        self.left -= length


def write_gguf(
    path: Path,
    entries: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
    *,
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
    extra: Mapping[str, str | int] | None = None,
) -> None:
    """Write sums (parts, columns) and counts (parts,) per tensor, byte for byte as llama-imatrix.

    `extra` keys come after its own; programs that do not know them pass over them.

    Raises:
        Dots1Error: a sum or count is negative or no number.
    """
    arrays = dict(_named_arrays(entries))
    with open_partial(path) as file:
        file.write(_header(arrays, datasets, chunk_count, chunk_size, extra or {}))
        for array in arrays.values():
            _pad(file)
            file.write(array.astype("<f4").tobytes())
        _pad(file)


def _named_arrays(
    entries: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for name, (sums, counts) in sorted(entries.items()):
        if counts.ndim != 1 or sums.ndim != 2 or len(sums) != len(counts):
            raise Dots1Error(f"{name} has sums {sums.shape} for counts {counts.shape}")
        if not all(np.all(np.isfinite(array) & (array >= 0)) for array in (sums, counts)):
            raise Dots1Error(f"{name} has a sum or count that is negative or no number")
        yield name + _SUMS, sums
        yield name + _COUNTS, counts.reshape(-1, 1)


def _header(
    arrays: Mapping[str, NDArray[np.float32]],
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
    extra: Mapping[str, str | int],
) -> bytes:
    string, array, uint32 = 8, 9, 4
    parts = [
        b"GGUF" + struct.pack("<IQQ", 3, len(arrays), 4 + len(extra)),
        _string("general.type") + struct.pack("<I", string) + _string("imatrix"),
        _string(_DATASETS) + struct.pack("<IIQ", array, string, len(datasets)),
        *map(_string, datasets),
        _string(_CHUNKS) + struct.pack("<II", uint32, chunk_count),
        _string(_CHUNK_SIZE) + struct.pack("<II", uint32, chunk_size),
    ]
    for key, value in extra.items():
        if isinstance(value, str):
            parts.append(_string(key) + struct.pack("<I", string) + _string(value))
        else:
            parts.append(_string(key) + struct.pack("<II", uint32, value))
    offset = 0
    for name, values in arrays.items():
        shape = values.shape if values.shape[0] > 1 else values.shape[1:]
        parts.append(_string(name) + struct.pack("<I", len(shape)))
        parts.append(struct.pack(f"<{len(shape)}Q", *reversed(shape)))
        parts.append(struct.pack("<IQ", 0, offset))
        offset += -(-values.size * 4 // _ALIGNMENT) * _ALIGNMENT
    return b"".join(parts)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))
