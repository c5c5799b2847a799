"""A Hugging Face checkpoint, read lazily: headers first, rows when somebody asks for them.

What is missing or corrupt is known before any work starts. This package parses the headers itself,
not with `safetensors.safe_open`: a truncated or hostile file gets an error that names the tensor,
24,000 tensors need no mappings, and reads go into buffers that the caller owns.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import Dots1Config, TensorSpec
from dots1_local.errors import CheckpointError
from dots1_local.ggml import to_float32

__all__ = [
    "INDEX", "SINGLE", "Checkpoint", "Slice", "header_length", "load_json", "promised_tensors",
    "read_exactly", "read_header", "read_index", "tensor_table",
]  # fmt: skip

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER = 100 << 20  # the safetensors format's own limit


@dataclass(frozen=True)
class Slice:
    """Where one tensor's bytes lie: contiguous, row-major, at `offset` in `file`."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return _DTYPE_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.item_bytes

    def part(self, start: int, shape: tuple[int, ...]) -> "Slice":
        """The `shape`d tensor that begins `start` elements into this one."""
        return Slice(self.file, self.offset + start * self.item_bytes, self.dtype, shape)


class Checkpoint:
    """A folder with config.json and one or many safetensors files.

    Packed expert tensors (`mlp.experts.gate_up_proj`, as transformers >= 5 may save them) have the
    published names of single experts, too.
    """

    def __init__(self, path: Path, raw_config: dict[str, Any], slices: dict[str, Slice]) -> None:
        self.path = path
        self.raw_config = raw_config
        self.config = Dots1Config.from_json(raw_config)
        self._slices = slices
        self._slices |= dict(_unpack(slices, self.config))

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Read config.json, the index and every shard's header.

        Raises:
            CheckpointError: something is missing, truncated or malformed, or the architecture is
                another one.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"no such folder: {folder}")
        raw_config = load_json(folder / "config.json")
        Dots1Config.from_json(raw_config)  # a wrong architecture is reported before a missing shard
        return cls(folder, raw_config, _read_headers(folder))

    @property
    def name(self) -> str:
        """The model's name: the folder's."""
        return self.path.resolve().name

    @property
    def source(self) -> str:
        """The checkpoint's origin, for errors."""
        return str(self.path)

    @property
    def fingerprint(self) -> str:
        """Changes when the weights change; sizes and times stand for the shards' contents."""
        stats = ((path.name, path.stat()) for path in self.shards)
        return ";".join(f"{name}:{s.st_size}:{s.st_mtime_ns}" for name, s in stats)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """The contents of generation_config.json; empty if the file is missing."""
        path = self.path / "generation_config.json"
        return load_json(path) if path.exists() else {}

    @property
    def shards(self) -> list[Path]:
        """The safetensors files, in name order."""
        return sorted({piece.file for piece in self._slices.values()})

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def locate(self, name: str) -> Slice:
        """Where the tensor `name` lies.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        try:
            return self._slices[name]
        except KeyError:
            raise CheckpointError(f"{self.source} has no tensor {name}") from None

    def check(self, tensors: Iterable[TensorSpec]) -> None:
        """Check that every source of `tensors` is there, in the shape config.json promises.

        Raises:
            CheckpointError: a tensor is missing or misshapen; the first is named.
        """
        for tensor in tensors:
            for source in tensor.sources:
                found = self._slices.get(source)
                if found is None:
                    raise CheckpointError(self._explain_missing(source, tensor.layer))
                if found.shape != tensor.source_shape:
                    raise CheckpointError(
                        f"{source} in {found.file.name} has shape {list(found.shape)} where "
                        f"config.json makes it {list(tensor.source_shape)}"
                    )

    def check_nothing_else(self, tensors: Iterable[TensorSpec]) -> None:
        """Refuse tensors that the model has no place for: without them it would compute otherwise.

        Raises:
            CheckpointError: there is such a tensor; the first is named.
        """
        used = {source for tensor in tensors for source in tensor.sources}
        for name, piece in self._slices.items():
            if name not in used and not _is_derived(name, self.config):
                raise CheckpointError(
                    f"{name} in {piece.file.name} has no place in the model that config.json "
                    "describes; is it the config of this checkpoint?"
                )

    def _explain_missing(self, source: str, layer: int | None) -> str:
        prefix = f"model.layers.{layer}."
        if layer is not None and not any(name.startswith(prefix) for name in self._slices):
            return (
                f"{self.source} has no layer {layer}, though config.json says there are "
                f"{self.config.num_hidden_layers} layers; fetch the missing shards"
            )
        where = f"is in no shard that {INDEX} lists" if (self.path / INDEX).exists() else "is not"
        return f"tensor {source} {where} in {self.source}; the checkpoint is incomplete"

    def read(self, name: str) -> NDArray[np.float32]:
        """One whole tensor as float32, in its checkpoint shape.

        Raises:
            CheckpointError: the tensor is missing or cannot be read.
        """
        piece = self.locate(name)
        raw = np.empty(piece.nbytes, np.uint8)
        try:
            with open(piece.file, "rb") as file:
                read_exactly(file.fileno(), raw, piece.offset, piece.file)
        except OSError as error:
            raise CheckpointError(f"cannot read {piece.file}: {error.strerror}") from None
        out = np.empty(piece.shape, np.float32)
        to_float32(raw, piece.dtype, out)
        return out


def read_exactly(fd: int, buffer: NDArray[np.uint8], offset: int, path: Path) -> None:
    """Fill `buffer` from `offset` of an open file; threads may share the descriptor."""
    done = 0
    while done < buffer.size:
        data = os.pread(fd, buffer.size - done, offset + done)
        if not data:
            raise CheckpointError(f"{path} ended early; it was truncated while it was read")
        buffer[done : done + len(data)] = np.frombuffer(data, np.uint8)
        done += len(data)


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing, is unreadable, or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is this a Hugging Face checkpoint?") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def _read_headers(folder: Path) -> dict[str, Slice]:
    if (folder / INDEX).exists():
        weight_map = read_index(folder / INDEX)
        for shard in dict.fromkeys(weight_map.values()):
            if not os.path.isfile(folder / shard):  # Path.is_file may raise
                raise CheckpointError(f"shard {folder / shard} is missing; fetch it again")
        headers = {name: read_header(folder / name) for name in dict.fromkeys(weight_map.values())}
        return promised_tensors(weight_map, headers)
    single = folder / SINGLE
    if not single.exists():
        raise CheckpointError(f"{folder} has neither {INDEX} nor {SINGLE}")
    return read_header(single)


def read_index(path: Path) -> dict[str, str]:
    """The shard of every tensor in an index file; each shard is a plain file name.

    Raises:
        CheckpointError: the file does not map tensors to file names.
    """
    weight_map = load_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{path} maps {name} to {shard!r}, not a file name")
    return weight_map


def promised_tensors(
    weight_map: Mapping[str, str], headers: Mapping[str, Mapping[str, Slice]]
) -> dict[str, Slice]:
    """The places of all tensors that an index lists, from the headers of its shards.

    Raises:
        CheckpointError: a shard lacks a tensor that the index promises.
    """
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(
                f"{INDEX} promises {name} in {shard}, but the shard does not hold it"
            )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _is_derived(name: str, config: Dots1Config) -> bool:
    """Tensors that hold nothing new: packed experts (read by expert), tied head, RoPE tables."""
    packed = re.search(r"\.mlp\.experts\.(gate_up|down)_proj(\.weight)?$", name)
    tied = config.tie_word_embeddings and name == "lm_head.weight"
    return bool(packed or tied or name.endswith(".rotary_emb.inv_freq"))


def _unpack(slices: Mapping[str, Slice], config: Dots1Config) -> Iterator[tuple[str, Slice]]:
    """Per-expert views of packed tensors: gate_up (E, 2W, H) and down (E, H, W)."""
    experts, hidden = config.n_routed_experts, config.hidden_size
    width = config.moe_intermediate_size
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        for stem, parts, shape in (
            ("gate_up_proj", ("gate", "up"), (experts, 2 * width, hidden)),
            ("down_proj", ("down",), (experts, hidden, width)),
        ):
            packed = slices.get(f"{prefix}.{stem}") or slices.get(f"{prefix}.{stem}.weight")
            if packed is None:
                continue
            if packed.shape != shape:
                raise CheckpointError(
                    f"{prefix}.{stem} in {packed.file.name} has shape {list(packed.shape)} where "
                    f"config.json makes it {list(shape)}"
                )
            piece = (shape[1] // len(parts), shape[2])
            for index in range(experts * len(parts)):
                expert, part = divmod(index, len(parts))
                name = f"{prefix}.{expert}.{parts[part]}_proj.weight"
                yield name, packed.part(index * prod(piece), piece)


def read_header(path: Path) -> dict[str, Slice]:
    """The tensors of a safetensors file, by name."""
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            length = header_length(path, file.read(8), size)
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


def tensor_table(path: Path, header: bytes, size: int) -> dict[str, Slice]:
    """The tensors that a header names; every range is checked against the file's size.

    Raises:
        CheckpointError: the header is garbled, or promises more than the file holds.
    """
    try:
        table = json.loads(header)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} has a garbled safetensors header")
    slices = {
        name: _slice(path, name, entry, 8 + len(header), size)
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


def _slice(path: Path, name: str, entry: Any, base: int, size: int) -> Slice:
    try:
        dtype, (start, end) = str(entry["dtype"]), entry["data_offsets"]
        shape = tuple(entry["shape"])
        whole = all(type(n) is int and n >= 0 for n in (start, end, *shape))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path} has a garbled description of tensor {name}")
    if dtype not in _DTYPE_BYTES:
        raise CheckpointError(
            f"{name} in {path.name} is {dtype!r}; dots1-local reads F32, F16 and BF16"
        )
    if end - start != prod(shape) * _DTYPE_BYTES[dtype]:
        raise CheckpointError(f"{name} in {path.name} has {end - start} bytes for shape {shape}")
    if base + end > size:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {base + end} of {size}; fetch it again"
        )
    return Slice(path, base + start, dtype, shape)
