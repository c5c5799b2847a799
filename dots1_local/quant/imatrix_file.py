"""Importance files (imatrix), read and written in llama.cpp's formats.

In the GGUF format a tensor NAME has `NAME.in_sum2`, the squared activations summed per column, and
`NAME.counts`, the number of tokens in these sums: one count, or one per expert. In the older .dat
format the sums are already divided by the number of tokens and multiplied by `ncall`, and there is
no count per expert.

People share these files, so lengths, sums and counts are checked before they are used.
"""

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeGuard

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import Dots1Error
from dots1_local.files.gguf import pack_key, pack_string
from dots1_local.files.gguf_header import GGUFHeader, GGUFTensor
from dots1_local.files.partial_file import open_partial
from dots1_local.quant.importance import Floats, Importance, TensorSums

__all__ = ["load_importance", "write_imatrix"]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_ALIGNMENT = 32
_MAX_COUNT = 2.0**53  # tokens; llama.cpp's conversion to an integer overflows later
_MAX_NAME = 4096
_MAX_VALUES = 1 << 26  # 128 experts of 4096 columns are 2^19; a sparse file could claim any number


def load_importance(path: str | os.PathLike[str]) -> Importance:
    """Open an importance file of either format and check every number in it.

    Raises:
        Dots1Error: missing, truncated or corrupt; the message names the file and the tensor.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            legacy = file.read(4) != b"GGUF"
            file.seek(0)
            found = _DatReader(path, file).read() if legacy else _read_gguf(path, file)
    except OSError as error:
        raise Dots1Error(f"cannot read {path}: {error.strerror}") from error
    if not found.tensors:
        raise Dots1Error(f"{path} holds no importance data")
    for name in found.tensors:
        if not _are_sums(found.sums(name)):
            raise Dots1Error(f"{path}: {name} has a sum that is negative or not a number")
    return found


def _are_sums(values: NDArray[np.floating]) -> bool:
    return bool(np.all((values >= 0) & np.isfinite(values)))


def _read_gguf(path: Path, file: BinaryIO) -> Importance:
    header = GGUFHeader.read(path)
    chunks, chunk_size, datasets = (
        header.keys.get(key) for key in (_CHUNKS, _CHUNK_SIZE, _DATASETS)
    )
    if not (_is_count(chunks) and _is_count(chunk_size) and isinstance(datasets, list)):
        raise Dots1Error(
            f"{path} is not an importance file: it lacks {_DATASETS}, {_CHUNKS} or {_CHUNK_SIZE}"
        )
    arrays = {tensor.name: tensor for tensor in header.tensors}
    names = sorted(
        {name.removesuffix(_SUMS) for name in arrays if name.endswith(_SUMS)}
        | {name.removesuffix(_COUNTS) for name in arrays if name.endswith(_COUNTS)}
    )
    tensors = {name: _gguf_sums(path, file, name, arrays) for name in names}
    return Importance(path, False, tuple(map(str, datasets)), chunks, chunk_size, tensors)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and 0 <= value < 1 << 32


def _gguf_sums(
    path: Path, file: BinaryIO, name: str, arrays: Mapping[str, GGUFTensor]
) -> TensorSums:
    sums, counts = arrays.get(name + _SUMS), arrays.get(name + _COUNTS)
    if sums is None or counts is None:
        raise Dots1Error(f"{path}: {name} has sums without counts or counts without sums")
    if sums.type != "F32" or counts.type != "F32":
        raise Dots1Error(f"{path}: the sums and counts of {name} must be F32")
    values, parts = sums.nbytes // 4, counts.nbytes // 4
    if not parts or not 0 < values <= _MAX_VALUES or values % parts:
        raise Dots1Error(f"{path}: {name} has {values} sums for {parts} counts")
    file.seek(counts.offset)
    exact = np.frombuffer(file.read(counts.nbytes), "<f4").astype(np.float64)
    if not np.all((exact >= 0) & (exact < _MAX_COUNT)):
        raise Dots1Error(f"{path}: {name} has a count that is negative, too large or not a number")
    # As llama.cpp does: to the nearest integer, halves away from zero.
    return TensorSums(sums.offset, values, np.floor(exact + 0.5).astype(np.float32))


class _DatReader:
    """A cursor over a .dat file: little-endian int32, names and floats, all unaligned."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._left = os.fstat(file.fileno()).st_size

    def read(self) -> Importance:
        """Read the whole file except the sums, which are passed over."""
        tensors: dict[str, TensorSums] = {}
        for _ in range(self._integer("number of tensors", least=1)):
            name = self._text("a name", self._integer("length of a name", least=1, most=_MAX_NAME))
            if name in tensors:
                raise Dots1Error(f"{self._path}: {name} comes twice")
            calls = self._integer(f"ncall of {name}")
            values = self._integer(f"number of values of {name}", least=1, most=_MAX_VALUES)
            offset = self._file.tell()
            self._use(f"the values of {name}", values * 4)
            self._file.seek(values * 4, os.SEEK_CUR)
            tensors[name] = TensorSums(offset, values, np.array([calls], np.float32))
        # Old files lack the number of chunks and the dataset, which come last.
        chunks = self._integer("chunk count") if self._left >= 4 else 0
        length = self._integer("length of the dataset name") if self._left >= 4 else 0
        dataset = self._text("the dataset name", length)
        return Importance(self._path, True, (dataset,) if dataset else (), chunks, 0, tensors)

    def _integer(self, what: str, least: int = 0, most: int = 2**31 - 1) -> int:
        self._use(what, 4)
        value: int = struct.unpack("<i", self._file.read(4))[0]
        if not least <= value <= most:
            raise Dots1Error(
                f"{self._path} is not an importance file, or corrupt: {what} is {value}"
            )
        return value

    def _text(self, what: str, length: int) -> str:
        self._use(what, length)
        return self._file.read(length).decode(errors="replace")

    def _use(self, what: str, length: int) -> None:
        if length > self._left:
            raise Dots1Error(f"{self._path} ends before {what}; make or fetch it again")
        self._left -= length


def write_imatrix(
    path: Path,
    entries: Mapping[str, tuple[Floats, Floats]],
    *,
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
    extra: Mapping[str, str | int] | None = None,
) -> None:
    """Write sums (experts, columns) and counts (experts,) per tensor, byte for byte as
    llama-imatrix does in its GGUF format.

    `extra` keys follow the format's own; other programs ignore them.

    Raises:
        Dots1Error: a sum or count is negative or not a number.
    """
    arrays = dict(_named_arrays(entries))
    with open_partial(path) as file:
        file.write(_header(arrays, datasets, chunk_count, chunk_size, extra or {}))
        for array in arrays.values():
            _pad(file)
            file.write(array.astype("<f4").tobytes())
        _pad(file)


def _named_arrays(entries: Mapping[str, tuple[Floats, Floats]]) -> Iterator[tuple[str, Floats]]:
    for name, (sums, counts) in sorted(entries.items()):
        if counts.ndim != 1 or sums.ndim != 2 or len(sums) != len(counts):
            raise Dots1Error(f"{name} has sums {sums.shape} for counts {counts.shape}")
        if not (_are_sums(sums) and _are_sums(counts)):
            raise Dots1Error(f"{name} has a sum or count that is negative or not a number")
        yield name + _SUMS, sums
        yield name + _COUNTS, counts.reshape(-1, 1)


def _header(
    arrays: Mapping[str, Floats],
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
    extra: Mapping[str, str | int],
) -> bytes:
    keys = [
        pack_key("general.type", "string", "imatrix"),
        pack_key(_DATASETS, "string[]", datasets),
        pack_key(_CHUNKS, "u32", chunk_count),
        pack_key(_CHUNK_SIZE, "u32", chunk_size),
        *(pack_key(key, "u32" if isinstance(v, int) else "string", v) for key, v in extra.items()),
    ]
    parts = [b"GGUF" + struct.pack("<IQQ", 3, len(arrays), len(keys)), *keys]
    offset = 0
    for name, array in arrays.items():
        shape = array.shape if array.shape[0] > 1 else array.shape[1:]
        parts.append(pack_string(name) + struct.pack("<I", len(shape)))
        parts.append(struct.pack(f"<{len(shape)}Q", *reversed(shape)))
        parts.append(struct.pack("<IQ", 0, offset))
        offset += -(-array.size * 4 // _ALIGNMENT) * _ALIGNMENT
    return b"".join(parts)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))
