"""The keys of a GGUF file: read when somebody asks, packed as the file stores them, changed."""

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = [
    "ARRAY", "KIND_IDS", "SCALARS", "STRING", "Change", "Keys", "Kind", "RawKey", "Value",
    "pack_key", "pack_string",
]  # fmt: skip

Value = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]
Kind = Literal["u32", "i32", "f32", "bool", "string", "i32[]", "string[]"]

# struct's letter of each scalar type of a key.
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9
_LENGTH, _ARRAY_START = struct.Struct("<Q"), struct.Struct("<IQ")
# Kind of a key's value: GGUF's type id, struct's letter.
_PACKED = {"u32": (4, "I"), "i32": (5, "i"), "f32": (6, "f"), "bool": (7, "?"), "string": (8, "")}
# GGUF's id of each kind; all arrays have the same one.
KIND_IDS: Mapping[Kind, int] = {
    kind: ARRAY if kind.endswith("[]") else _PACKED[kind][0] for kind in get_args(Kind)
}


@dataclass(frozen=True)
class Change:
    """Set a key to a value of a kind; without a value, remove it."""

    key: str
    kind: Kind = "u32"
    value: Value | None = None


@dataclass(frozen=True)
class RawKey:
    """A key as it lies in the file: `raw` holds its name, the id of its type and its value."""

    kind: int
    raw: bytes
    value_at: int

    def decode(self) -> Value:
        if self.kind == STRING:
            return self.raw[self.value_at + 8 :].decode("utf-8", errors="replace")
        if self.kind != ARRAY:
            value: Value = struct.unpack_from("<" + SCALARS[self.kind], self.raw, self.value_at)[0]
            return value
        item, count = _ARRAY_START.unpack_from(self.raw, self.value_at)
        begin = self.value_at + _ARRAY_START.size
        if item == STRING:
            return list(self._strings(begin, count))
        return list(struct.unpack_from(f"<{count}{SCALARS[item]}", self.raw, begin))

    def _strings(self, position: int, count: int) -> Iterator[str]:
        raw, length_at = self.raw, _LENGTH.unpack_from
        for _ in range(count):
            end = position + 8 + length_at(raw, position)[0]
            yield raw[position + 8 : end].decode("utf-8", errors="replace")
            position = end


class Keys(Mapping[str, Value]):
    """The keys of a file in its order; each value is decoded at first use."""

    def __init__(self, raw: Mapping[str, RawKey]) -> None:
        self._raw = raw
        self._decoded: dict[str, Value] = {}

    def __getitem__(self, key: str) -> Value:
        if key not in self._decoded:
            self._decoded[key] = self._raw[key].decode()
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)

    def strings(self, key: str) -> list[str]:
        """The strings in an array; empty if the key is missing or is something else."""
        value = self.get(key)
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []

    def kind(self, key: str) -> int:
        """GGUF's id of the type of the key's value; 9 for every array."""
        return self._raw[key].kind

    def raw(self, key: str) -> bytes:
        """The key's name, type and value, as they lie in the file."""
        return self._raw[key].raw

    def changed(self, changes: Iterable[Change]) -> "Keys":
        """Return the keys with changes made; a changed key keeps its place, new keys are last."""
        raw = dict(self._raw)
        for change in changes:
            if change.value is None:
                raw.pop(change.key, None)
            else:
                packed = pack_key(change.key, change.kind, change.value)
                value_at = len(pack_string(change.key)) + 4
                raw[change.key] = RawKey(KIND_IDS[change.kind], packed, value_at)
        return Keys(raw)


def pack_key(key: str, kind: str, value: Any) -> bytes:
    """A key with its value as GGUF stores them.

    `kind` is "u32", "i32", "f32", "bool" or "string", or one of them with "[]" for a list.
    """
    type_id, layout = _PACKED[kind.removesuffix("[]")]
    is_list = kind.endswith("[]")
    values = value if is_list else [value]
    head = (
        struct.pack("<IIQ", ARRAY, type_id, len(values)) if is_list else struct.pack("<I", type_id)
    )
    if layout:
        return pack_string(key) + head + struct.pack(f"<{len(values)}{layout}", *values)
    return b"".join([pack_string(key), head, *map(pack_string, values)])


def pack_string(text: str) -> bytes:
    """A string as GGUF stores it: its length in bytes, and UTF-8; "?" is for what has none."""
    raw = text.encode(errors="replace")
    return struct.pack("<Q", len(raw)) + raw
