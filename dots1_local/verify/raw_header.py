"""The keys of a GGUF file as bytes, so that some can be changed and all others stay what they are.

`gguf_header` has read the same header before: this walk relies on its checks.
"""

import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dots1_local.errors import GGUFError
from dots1_local.verify.findings import Change, Kind

__all__ = ["KIND_IDS", "RawHeader"]

KIND_IDS: Mapping[Kind, int] = {
    "u32": 4, "f32": 6, "bool": 7, "string": 8, "i32[]": 9, "string[]": 9,
}  # fmt: skip
_SIZES = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), map(struct.calcsize, "BbHhIif?Qqd"),
                  strict=True))  # fmt: skip
_FORMATS = {"u32": "<I", "f32": "<f", "bool": "<?"}
_I32, _STRING, _ARRAY = 5, 8, 9


@dataclass(frozen=True)
class RawHeader:
    """`entries` are (key, type id, bytes of key, type and value); `infos` are those of the tensors.

    `length` is where the header ends; data begins at the next multiple of `alignment`.
    """

    version: int
    n_tensors: int
    entries: tuple[tuple[str, int, bytes], ...]
    infos: bytes
    alignment: int
    length: int

    @classmethod
    def read(cls, path: Path) -> "RawHeader":
        """The header of a file whose header `read_header` has accepted."""
        try:
            with (
                open(path, "rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                return _Walk(data).read()
        except (OSError, ValueError, struct.error):
            raise GGUFError(f"{path} changed while it was read") from None

    @property
    def data_start(self) -> int:
        return self.aligned(self.length)

    def aligned(self, position: int) -> int:
        """The first multiple of the alignment from `position` on."""
        return -(-position // self.alignment) * self.alignment

    def changed(self, changes: Iterable[Change]) -> bytes:
        """The header with `changes` made, up to where the data section begins.

        A key that is there keeps its place; new ones come last.
        """
        wanted = {change.key: change for change in changes}
        entries = [
            _entry(wanted.pop(key)) if key in wanted else raw for key, _, raw in self.entries
        ]
        entries = [raw for raw in (*entries, *map(_entry, wanted.values())) if raw]
        counts = struct.pack("<IQQ", self.version, self.n_tensors, len(entries))
        header = b"GGUF" + counts + b"".join(entries) + self.infos
        return header + bytes(-len(header) % self.alignment)


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 4

    def read(self) -> RawHeader:
        version, n_tensors, n_keys = self._numbers("<IQQ")
        entries = tuple(self._key() for _ in range(n_keys))
        start = self._at
        for _ in range(n_tensors):
            self._skip_string()
            (dimensions,) = self._numbers("<I")
            self._at += 8 * dimensions + 12
        infos = self._data[start : self._at]
        return RawHeader(version, n_tensors, entries, infos, _alignment(entries), self._at)

    def _key(self) -> tuple[str, int, bytes]:
        start = self._at
        self._skip_string()
        name = self._data[start + 8 : self._at].decode("utf-8", errors="replace")
        (kind,) = self._numbers("<I")
        if kind == _ARRAY:
            item, count = self._numbers("<IQ")
            self._skip(item, count)
        else:
            self._skip(kind, 1)
        return name, kind, self._data[start : self._at]

    def _skip(self, kind: int, count: int) -> None:
        if kind != _STRING:
            self._at += count * _SIZES[kind]
            return
        for _ in range(count):
            self._skip_string()

    def _skip_string(self) -> None:
        (length,) = self._numbers("<Q")
        self._at += length

    def _numbers(self, layout: str) -> tuple[int, ...]:
        found = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return found


def _alignment(entries: Iterable[tuple[str, int, bytes]]) -> int:
    raw = {key: raw for key, _, raw in entries}.get("general.alignment")
    if raw is None:
        return 32
    value = raw[8 + len("general.alignment") + 4 :]
    return int.from_bytes(value, "little")


def _entry(change: Change) -> bytes:
    """A key with its value; nothing for one that goes."""
    if change.value is None:
        return b""
    return _string(change.key) + struct.pack("<I", KIND_IDS[change.kind]) + _value(change)


def _value(change: Change) -> bytes:
    value = change.value
    if change.kind == "string":
        return _string(str(value))
    if not isinstance(value, list):
        return struct.pack(_FORMATS[change.kind], value)
    if change.kind == "string[]":
        return struct.pack("<IQ", _STRING, len(value)) + b"".join(_string(str(v)) for v in value)
    return struct.pack("<IQ", _I32, len(value)) + struct.pack(f"<{len(value)}i", *value)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
