"""The header of one GGUF file: keys, and where its tensors lie.

This package parses headers itself, because they are long and come from strangers: gguf-py takes
seconds over 152,064 tokens, and llama.cpp aborts the process on some files. Every length is checked
before it is used, and a value is decoded when somebody asks for it.
"""

import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

from dots1_local.errors import GGUFError
from dots1_local.files.gguf_keys import ARRAY, SCALARS, STRING, Keys, RawKey
from dots1_local.files.lfs_pointer import POINTER_START, refuse_pointer
from dots1_local.ggml import TYPES

__all__ = ["GGUFHeader", "GGUFTensor", "HeaderIncomplete"]

# A real header is a few MB; beyond these limits a file is garbage, not a bigger model.
_MAX_HEADER = 256 << 20
_MAX_ITEMS = 1 << 24
_MAX_NAME = 1 << 16
_MAX_DIMENSIONS = 4

_LENGTH = struct.Struct("<Q")

# ggml's id → (name, weights in a block, bytes of a block), including types of other models' files.
_LAYOUTS = {kind.ggml: (kind.name, kind.block, kind.bytes) for kind in TYPES.values()} | {
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
}  # fmt: skip


class HeaderIncomplete(GGUFError):
    """More of the file is needed to read its header."""


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: `shape` in numpy order, `nbytes` bytes of `type` at `offset` of `file`."""

    name: str
    type: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class GGUFHeader:
    """The header of one file; the tensors' data begins at `data_start`.

    `size` is that of the whole file. `raw_tensors` describes the tensors as the file does, with
    offsets from `data_start`.
    """

    file: Path
    size: int
    version: int
    keys: Keys
    tensors: tuple[GGUFTensor, ...]
    raw_tensors: bytes
    alignment: int
    data_start: int

    @classmethod
    def read(cls, path: Path) -> "GGUFHeader":
        """Read and check one file's header.

        Raises:
            GGUFError: the file is missing, is not a GGUF file, is truncated, or contradicts itself.
        """
        if path.is_dir():
            raise GGUFError(f"{path} is a folder, not a GGUF file; dots1 convert makes a GGUF file")
        if not path.is_file():
            raise GGUFError(f"no such file: {path}")
        try:
            with open(path, "rb") as file:
                size = path.stat().st_size
                refuse_pointer(path, file.read(POINTER_START), GGUFError)
                length = min(size, _MAX_HEADER)
                if not length:  # mmap refuses it
                    return cls.parse(path, b"", size)
                with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ) as data:
                    return cls.parse(path, data, size)
        except OSError as error:
            raise GGUFError(f"cannot read {path}: {error.strerror}") from None

    @classmethod
    def parse(cls, path: Path, data: bytes | mmap.mmap, size: int) -> "GGUFHeader":
        """Read the header in `data`, the beginning of a file of `size` bytes; `path` names it.

        Raises:
            HeaderIncomplete: the header may go on behind `data`.
            GGUFError: as `read`.
        """
        if data[:4] != b"GGUF" or size < 24:
            raise GGUFError(f"{path} is not a GGUF file, or is truncated")
        return _Parser(path, data, size).header()

    def aligned(self, position: int) -> int:
        """The first multiple of the alignment from `position` on."""
        return -(-position // self.alignment) * self.alignment


class _Parser:
    """Reads one header from front to back; every range is checked against the file's size."""

    def __init__(self, path: Path, data: bytes | mmap.mmap, size: int) -> None:
        self._path, self._data, self._size = path, data, size
        self._position = 4

    def header(self) -> GGUFHeader:
        version = self._number("I")
        if version not in (2, 3):
            raise GGUFError(
                f"{self._path} is GGUF version {version}; dots1-local reads versions 2 and 3"
            )
        n_tensors, n_keys = self._count(), self._count()
        keys = self._keys(n_keys)
        begin = self._position
        described = [self._tensor() for _ in range(n_tensors)]
        raw_tensors = self._data[begin : self._position]
        alignment = self._alignment(keys)
        data_start = -(-self._position // alignment) * alignment
        tensors = tuple(
            GGUFTensor(name, kind, shape, self._path, data_start + offset, nbytes)
            for name, kind, shape, offset, nbytes in described
        )
        self._check_ranges(tensors, data_start, alignment)
        return GGUFHeader(
            self._path, self._size, version, keys, tensors, raw_tensors, alignment, data_start
        )

    def _keys(self, count: int) -> Keys:
        found: dict[str, RawKey] = {}
        for _ in range(count):
            begin = self._position
            key = self._name("a key")
            if key in found:
                raise GGUFError(f"{self._path} holds the key {key} twice")
            kind = self._number("I")
            value_at = self._position - begin
            self._skip_value(key, kind)
            found[key] = RawKey(kind, self._data[begin : self._position], value_at)
        return Keys(found)

    def _skip_value(self, key: str, kind: int) -> None:
        item, count = kind, 1
        if kind == ARRAY:
            item, count = self._number("I"), self._count()
        if item == STRING:
            self._skip_strings(count)
        elif item in SCALARS:
            self._skip(count * struct.calcsize(SCALARS[item]))
        else:
            raise GGUFError(f"{self._path} stores the key {key} as unknown type {item}")

    def _skip_strings(self, count: int) -> None:
        """Hop from length to length."""
        data, position, length_at = self._data, self._position, _LENGTH.unpack_from
        try:
            for _ in range(count):
                position += 8 + length_at(data, position)[0]
        except (struct.error, OverflowError):
            raise self._ends_early(position) from None
        self._skip(position - self._position)

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """Name, type, shape, offset in the data section, bytes."""
        name = self._name("a tensor")
        n_dimensions = self._number("I")
        if n_dimensions > _MAX_DIMENSIONS:
            raise GGUFError(f"{self._path} gives tensor {name} {n_dimensions} dimensions")
        # A tensor without dimensions has one weight, as for llama.cpp.
        shape = tuple(self._number("Q") for _ in range(n_dimensions))[::-1] or (1,)
        kind, offset = self._number("I"), self._number("Q")
        if kind not in _LAYOUTS:
            raise GGUFError(f"{self._path} stores tensor {name} as unknown type {kind}")
        type_name, block, block_bytes = _LAYOUTS[kind]
        if (columns := shape[-1]) % block:
            raise GGUFError(
                f"{self._path} has rows of {columns} weights in tensor {name}, which is not a "
                f"multiple of {type_name}'s blocks of {block}"
            )
        return name, type_name, shape, offset, prod(shape) // block * block_bytes

    def _alignment(self, keys: Keys) -> int:
        alignment = keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise GGUFError(
                f"{self._path} has alignment {alignment!r}, which is not a power of two"
            )
        return alignment

    def _check_ranges(self, tensors: tuple[GGUFTensor, ...], start: int, alignment: int) -> None:
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise GGUFError(f"{self._path} holds two tensors of the same name")
        for tensor in tensors:
            if tensor.offset + tensor.nbytes > self._size:
                raise GGUFError(
                    f"{self._path} is truncated: {tensor.name} ends at byte "
                    f"{tensor.offset + tensor.nbytes} of {self._size}; fetch it again"
                )
            if (tensor.offset - start) % alignment:
                raise GGUFError(f"{self._path} has {tensor.name} at an unaligned offset")
        by_offset = sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes))
        for before, after in pairwise(by_offset):
            if before.offset + before.nbytes > after.offset:
                raise GGUFError(f"{self._path} has {before.name} and {after.name} overlapping")

    def _name(self, what: str) -> str:
        length = self._number("Q")
        begin = self._position
        if length <= _MAX_NAME:
            self._skip(length)
        name = self._data[begin : self._position].decode("utf-8", errors="replace")
        if not name.isprintable() or not name:
            raise GGUFError(f"{self._path} has a garbled header: the name of {what} is unreadable")
        return name

    def _count(self) -> int:
        count = self._number("Q")
        if count > _MAX_ITEMS:
            raise GGUFError(f"{self._path} has a garbled header: it counts {count} items")
        return count

    def _number(self, layout: str) -> int:
        """The next number; `layout` is struct's letter of it."""
        begin = self._position
        self._skip(struct.calcsize("<" + layout))
        value: int = struct.unpack_from("<" + layout, self._data, begin)[0]
        return value

    def _skip(self, count: int) -> None:
        if self._position + count > len(self._data):
            raise self._ends_early(self._position + count)
        self._position += count

    def _ends_early(self, end: int) -> GGUFError:
        """The error over something that would end at `end` or later."""
        if len(self._data) < min(self._size, _MAX_HEADER) and end <= self._size:
            return HeaderIncomplete(f"{self._path} has a header beyond {len(self._data)} bytes")
        if self._size > _MAX_HEADER:
            return GGUFError(f"{self._path} has a header beyond {_MAX_HEADER >> 20} MiB")
        return GGUFError(f"{self._path} is truncated inside its header; fetch it again")
