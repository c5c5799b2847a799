"""The header of one GGUF file: keys, and where its tensors lie.

An own parser because headers are long and come from strangers: gguf-py takes seconds over 152,064
tokens, and llama.cpp aborts the process on some files. Every length is checked before it is used,
and an array is decoded when somebody asks for it.

What a GGUF model holds: its keys, and its tensors with their roles, split files included.
"""

import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

from dots1_local.architecture import Role
from dots1_local.errors import GGUFError
from dots1_local.ggml import TYPES

__all__ = [
    "GGUFFile",
    "GGUFTensor",
    "Keys",
    "Value",
    "read_header",
    "role_of",
]


Value = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]

# A real header is a few MB; beyond these limits a file is garbage, not a bigger model.
_MAX_HEADER = 256 << 20
_MAX_ITEMS = 1 << 24
_MAX_NAME = 1 << 16
_MAX_DIMENSIONS = 4

# struct's letter of each scalar type of a key.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9

# ggml's id → (name, weights in a block, bytes of a block), those of other models' files included.
_LAYOUTS = {kind.ggml: (kind.name, kind.block, kind.bytes) for kind in TYPES.values()} | {
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}


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
class _Array:
    """An array as it lies in the file; strings are a length (8 bytes) and that many bytes."""

    kind: int
    count: int
    raw: bytes

    def decode(self) -> Value:
        if self.kind != _STRING:
            return list(struct.unpack(f"<{self.count}{_SCALARS[self.kind]}", self.raw))
        return list(self._strings())

    def _strings(self) -> Iterator[str]:
        position, length_at = 0, struct.Struct("<Q").unpack_from
        for _ in range(self.count):
            end = position + 8 + length_at(self.raw, position)[0]
            yield self.raw[position + 8 : end].decode("utf-8", errors="replace")
            position = end


class Keys(Mapping[str, Value]):
    """The keys of a file in its order; arrays are decoded when they are first used.

    `kinds` are GGUF's ids of the types of the values.
    """

    def __init__(self, values: dict[str, Value | _Array], kinds: Mapping[str, int]) -> None:
        self._values, self.kinds = values, kinds

    def __getitem__(self, key: str) -> Value:
        value = self._values[key]
        if isinstance(value, _Array):
            value = self._values[key] = value.decode()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def read_header(path: Path) -> tuple[Keys, tuple[GGUFTensor, ...]]:
    """Keys and tensors of one file, every range checked against the file's size."""
    if path.is_dir():
        raise GGUFError(f"{path} is a folder, not a GGUF file; dots1 convert makes one of it")
    if not path.is_file():
        raise GGUFError(f"no such file: {path}")
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            if file.read(4) != b"GGUF" or size < 24:
                raise GGUFError(f"{path} is not a GGUF file, or is truncated")
            with mmap.mmap(file.fileno(), min(size, _MAX_HEADER), access=mmap.ACCESS_READ) as data:
                return _Header(path, data, size).read()
    except OSError as error:
        raise GGUFError(f"cannot read {path}: {error.strerror}") from None


class _Header:
    """A walk through one header, front to back."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path, self._data, self._size = path, data, size
        self._position = 4

    def read(self) -> tuple[Keys, tuple[GGUFTensor, ...]]:
        version = self._scalar("I")
        if version not in (2, 3):
            raise GGUFError(f"{self._path} is GGUF version {version}; versions 2 and 3 are known")
        n_tensors, n_keys = self._count(), self._count()
        keys = self._read_keys(n_keys)
        tensors = [self._tensor() for _ in range(n_tensors)]
        return keys, self._place(tensors, keys.get("general.alignment", 32))

    def _read_keys(self, count: int) -> Keys:
        values: dict[str, Value | _Array] = {}
        kinds: dict[str, int] = {}
        for _ in range(count):
            key = self._name("a key")
            if key in values:
                raise GGUFError(f"{self._path} holds the key {key} twice")
            kinds[key] = self._scalar("I")
            values[key] = self._value(key, kinds[key])
        return Keys(values, kinds)

    def _value(self, key: str, kind: int) -> Value | _Array:
        if kind == _STRING:
            return self._take(self._scalar("Q")).decode("utf-8", errors="replace")
        if kind == _ARRAY:
            return self._array(key, self._scalar("I"), self._count())
        return self._scalar(self._format(key, kind))

    def _array(self, key: str, kind: int, count: int) -> _Array:
        if kind == _STRING:
            return _Array(kind, count, self._take(self._strings_length(count)))
        width = struct.calcsize(self._format(key, kind))
        return _Array(kind, count, self._take(count * width))

    def _format(self, key: str, kind: int) -> str:
        if kind not in _SCALARS:
            raise GGUFError(f"{self._path} stores the key {key} as unknown type {kind}")
        return _SCALARS[kind]

    def _strings_length(self, count: int) -> int:
        """Bytes that the next `count` strings take, found by hopping from length to length."""
        data, position, length_at = self._data, self._position, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                position += 8 + length_at(data, position)[0]
        except (struct.error, OverflowError):
            raise self._ends_early() from None
        return position - self._position

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """Name, type, shape, offset in the data section, bytes."""
        name = self._name("a tensor")
        n_dimensions = self._scalar("I")
        if n_dimensions > _MAX_DIMENSIONS:
            raise GGUFError(f"{self._path} gives tensor {name} {n_dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(n_dimensions))[::-1]
        kind, offset = self._scalar("I"), self._scalar("Q")
        if kind not in _LAYOUTS:
            raise GGUFError(f"{self._path} stores tensor {name} as unknown type {kind}")
        type_name, block, block_bytes = _LAYOUTS[kind]
        if prod(shape[-1:]) % block:
            raise GGUFError(
                f"{self._path} has rows of {shape[-1]} in tensor {name}, no whole number of "
                f"{type_name} blocks"
            )
        return name, type_name, shape, offset, prod(shape) // block * block_bytes

    def _place(
        self, tensors: list[tuple[str, str, tuple[int, ...], int, int]], alignment: Value
    ) -> tuple[GGUFTensor, ...]:
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise GGUFError(f"{self._path} has alignment {alignment!r}, no power of two")
        base = -(-self._position // alignment) * alignment
        placed = tuple(
            GGUFTensor(name, kind, shape, self._path, base + offset, nbytes)
            for name, kind, shape, offset, nbytes in tensors
        )
        self._check_ranges(placed, base, alignment)
        return placed

    def _check_ranges(self, tensors: tuple[GGUFTensor, ...], base: int, alignment: int) -> None:
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise GGUFError(f"{self._path} holds two tensors of the same name")
        for tensor in tensors:
            if tensor.offset + tensor.nbytes > self._size:
                raise GGUFError(
                    f"{self._path} is truncated: {tensor.name} ends at byte "
                    f"{tensor.offset + tensor.nbytes} of {self._size}; fetch it again"
                )
            if (tensor.offset - base) % alignment:
                raise GGUFError(f"{self._path} has {tensor.name} at an unaligned offset")
        by_offset = sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes))
        for before, after in pairwise(by_offset):
            if before.offset + before.nbytes > after.offset:
                raise GGUFError(f"{self._path} has {before.name} and {after.name} overlapping")

    def _name(self, what: str) -> str:
        length = self._scalar("Q")
        raw = self._take(length) if length <= _MAX_NAME else b""
        name = raw.decode("utf-8", errors="replace")
        if not name.isprintable() or not name:
            raise GGUFError(f"{self._path} has a garbled header: the name of {what} is unreadable")
        return name

    def _count(self) -> int:
        count = int(self._scalar("Q"))
        if count > _MAX_ITEMS:
            raise GGUFError(f"{self._path} has a garbled header: it counts {count} items")
        return count

    def _scalar(self, layout: str) -> int:
        """The next number; a float or bool where `layout` says so."""
        value: int = struct.unpack("<" + layout, self._take(struct.calcsize("<" + layout)))[0]
        return value

    def _take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._data):
            raise self._ends_early()
        piece = self._data[self._position : end]
        self._position = end
        return piece

    def _ends_early(self) -> GGUFError:
        if self._size > _MAX_HEADER:
            return GGUFError(f"{self._path} has a header beyond {_MAX_HEADER >> 20} MiB")
        return GGUFError(f"{self._path} is truncated inside its header; fetch it again")


_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")

_ROLES: dict[str, Role] = {
    "token_embd": "embedding",
    "output": "head",
    "output_norm": "norm",
    **dict.fromkeys(("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"), "norm"),
    **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), "attention"),
    **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), "dense"),
    **dict.fromkeys(("ffn_gate_inp", "exp_probs_b"), "router"),
    **dict.fromkeys(("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"), "shared"),
    **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), "routed"),
}


def role_of(name: str) -> Role | None:
    """The role of a GGUF tensor by its name; None where no dots1 model has such a tensor."""
    match = re.fullmatch(r"(?:blk\.\d+\.)?(\w+)\.(?:weight|bias)", name)
    return _ROLES.get(match[1]) if match else None


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file; of a split one, the first shard's keys and all tensors."""

    files: tuple[Path, ...]
    keys: Keys
    tensors: tuple[GGUFTensor, ...]

    @classmethod
    def open(cls, path: str | Path) -> "GGUFFile":
        """Read the header at `path`, which may be any shard of a split file.

        Raises:
            GGUFError: missing, no GGUF, truncated, inconsistent, or a shard is not there.
        """
        path = Path(path)
        header = read_header(path)
        keys, tensors = header
        count = keys.get("split.count", 1)
        if not isinstance(count, int) or count <= 1:
            return cls((path,), keys, tensors)
        files = _shards(path, count)
        shards = [header if file == path else read_header(file) for file in files]
        everything = tuple(tensor for _, part in shards for tensor in part)
        _check_split(files, [keys for keys, _ in shards], everything)
        return cls(files, shards[0][0], everything)

    @property
    def nbytes(self) -> int:
        """Size on disk of all files together."""
        return sum(file.stat().st_size for file in self.files)


def _shards(path: Path, count: int) -> tuple[Path, ...]:
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise GGUFError(
            f"{path} is one of {count} shards but is not named NAME-00001-of-{count:05}.gguf; "
            "give it its name back"
        )
    names = (f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))
    files = tuple(path.with_name(name) for name in names)
    for file in files:
        if not file.exists():
            raise GGUFError(f"shard {file} is missing; fetch it, {count} shards make up the model")
    return files


def _check_split(
    files: tuple[Path, ...], keys: list[Keys], tensors: tuple[GGUFTensor, ...]
) -> None:
    for number, (file, own) in enumerate(zip(files, keys, strict=True)):
        if (own.get("split.no"), own.get("split.count")) != (number, len(files)):
            raise GGUFError(f"{file} is not shard {number + 1} of {len(files)} of one model")
    promised = keys[0].get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise GGUFError(
            f"the shards of {files[0]} hold {len(tensors)} tensors where {promised} are promised"
        )
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise GGUFError(f"two shards of {files[0]} hold a tensor of the same name")
