"""Headers of safetensors files: where each tensor lies.

This package parses the headers itself, not with `safetensors.safe_open`: a truncated or hostile
file gets an error that names the tensor, 24,000 tensors need no mappings, and reads go into buffers
that the caller owns.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import CheckpointError, Dots1Error
from dots1_local.files.json_file import JsonError, parse_json
from dots1_local.files.lfs_pointer import POINTER_START, refuse_pointer

__all__ = [
    "Scales", "Slice", "header_length", "load_arrays", "pack_header", "read_exactly", "read_header",
    "tensor_table",
]  # fmt: skip

_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
_ARRAYS = {"U8": np.uint8, "U16": np.uint16, "I64": np.int64}
_ITEM_BYTES = {**_DTYPE_BYTES, "U8": 1, "U16": 2, "I32": 4, "I64": 8}
_ALIGNMENT = 8  # of a header
_MAX_HEADER = 100 << 20  # the safetensors format's own limit


@dataclass(frozen=True)
class Slice:
    """Where one tensor's bytes lie: contiguous, row-major, at `offset` in `file`.

    What is stored is still to be multiplied by the `scales`.
    """

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    scales: "Scales | None" = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the weights and of their scales."""
        return (self.file, *((self.scales.place.file,) if self.scales else ()))

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.item_bytes

    def part(self, start: int, shape: tuple[int, ...]) -> "Slice":
        """The `shape`d tensor that begins `start` elements into this one."""
        return Slice(self.file, self.offset + start * self.item_bytes, self.dtype, shape)


@dataclass(frozen=True)
class Scales:
    """Where the scales of a matrix lie, one for each `block` (rows, columns) of it."""

    place: Slice
    block: tuple[int, int]


def read_header(path: Path) -> dict[str, Slice]:
    """The tensors of a safetensors file, by name."""
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            start = file.read(POINTER_START)
            refuse_pointer(path, start, CheckpointError)
            length = header_length(path, start, size)
            file.seek(8)
            return tensor_table(path, file.read(length), size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def header_length(path: Path, start: bytes, size: int) -> int:
    """The header's length in a file of `size` bytes; the first eight, in `start`, tell it.

    Raises:
        CheckpointError: the file is not a safetensors file.
    """
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(_MAX_HEADER, size - 8):
        raise CheckpointError(f"{path} is not a safetensors file, or is truncated")
    return length


def load_arrays(path: Path, limit: int) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The integers in a safetensors file of at most `limit` bytes, and the file's metadata.

    Raises:
        CheckpointError: the file is larger or garbled, or holds tensors of other types.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CheckpointError(f"{path} is larger than {limit:,} bytes")
    header = data[8 : 8 + header_length(path, data, len(data))]
    slices = tensor_table(path, header, len(data), tuple(_ARRAYS))
    arrays = {
        name: np.frombuffer(data, _ARRAYS[s.dtype], prod(s.shape), s.offset).reshape(s.shape)
        for name, s in slices.items()
    }
    metadata = parse_json(header).get("__metadata__")
    found = metadata if isinstance(metadata, dict) else {}
    return arrays, {key: value for key, value in found.items() if isinstance(value, str)}


def tensor_table(
    path: Path, header: bytes, size: int, dtypes: Sequence[str] = tuple(_DTYPE_BYTES)
) -> dict[str, Slice]:
    """The tensors that a header names; every range is checked against the file's size.

    Tensors of other types than `dtypes` are refused.

    Raises:
        CheckpointError: the header is garbled, or promises more than the file holds.
    """
    try:
        table = parse_json(header)
    except JsonError:
        table = None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} has a garbled safetensors header")
    slices = {
        name: _slice(path, name, entry, 8 + len(header), size, dtypes)
        for name, entry in table.items()
        if name != "__metadata__"
    }
    _check_overlap(path, slices)
    return slices


def _check_overlap(path: Path, slices: Mapping[str, Slice]) -> None:
    by_place = sorted(slices.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    for (first, left), (second, right) in pairwise(by_place):
        if left.offset + left.nbytes > right.offset:
            raise CheckpointError(f"{path} is corrupt: {first} and {second} share bytes")


def _slice(path: Path, name: str, entry: Any, base: int, size: int, dtypes: Sequence[str]) -> Slice:
    try:
        dtype, (start, end) = str(entry["dtype"]), entry["data_offsets"]
        shape = tuple(entry["shape"])
        whole = all(type(n) is int and n >= 0 for n in (start, end, *shape))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path} has a garbled description of tensor {name}")
    if dtype not in dtypes:
        *most, last = dtypes
        raise CheckpointError(
            f"{name} in {path.name} is {dtype!r}; dots1-local reads {', '.join(most)} and {last}"
        )
    if end - start != prod(shape) * _ITEM_BYTES[dtype]:
        raise CheckpointError(f"{name} in {path.name} has {end - start} bytes for shape {shape}")
    if base + end > size:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {base + end} of {size}; fetch it again"
        )
    return Slice(path, base + start, dtype, shape)


def pack_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The start of a file that holds tensors, given as dtype and shape, in this order.

    Returns the bytes up to the first tensor, and each tensor's offset from the file's beginning.
    Tensors with longer numbers should come first, so that every number is aligned.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        starts[name], end = end, end + prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (starts[name], end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    whole = len(text).to_bytes(8, "little") + text
    return whole, {name: len(whole) + start for name, start in starts.items()}


def read_exactly(
    fd: int,
    buffer: NDArray[np.uint8],
    offset: int,
    path: Path,
    error: type[Dots1Error] = CheckpointError,
) -> None:
    """Fill `buffer` from `offset` of an open file; threads may share the descriptor.

    Raises:
        CheckpointError: the file ends early; `error` may be another kind.
    """
    done = 0
    while done < buffer.size:
        count = os.preadv(fd, [buffer[done:].data], offset + done)
        if not count:
            raise error(f"{path} ended early; it was truncated while it was read")
        done += count
