"""A Hugging Face checkpoint, read lazily: headers first, rows when somebody asks for them.

What is missing or corrupt is known before any work starts.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import Dots1Config, TensorSpec
from dots1_local.errors import CheckpointError
from dots1_local.files.json_file import parse_json
from dots1_local.files.lfs_pointer import POINTER_START, refuse_pointer
from dots1_local.files.names import unicode_name
from dots1_local.files.safetensors import Slice, read_exactly, read_header
from dots1_local.files.scaled import multiply_scales, with_scales
from dots1_local.ggml import to_float32

__all__ = [
    "INDEX",
    "SINGLE",
    "Checkpoint",
    "load_json",
    "promised_tensors",
    "read_index",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """A folder with config.json and one or many safetensors files.

    Packed expert tensors (`mlp.experts.gate_up_proj`, as transformers >= 5 may save them) have the
    published names of single experts, too.
    """

    def __init__(self, path: Path, raw_config: dict[str, Any], slices: dict[str, Slice]) -> None:
        self.path = path
        self.raw_config = raw_config
        self.config = Dots1Config.from_json(raw_config)
        self._slices = with_scales(slices, raw_config)
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
        """The model's name: the folder's, as `unicode_name` spells it.

        In the hub's cache the folder is a commit, and a folder above it is named after the model.
        """
        folder = self.path.resolve()
        repo = folder.parent.parent.name
        if folder.parent.name == "snapshots" and repo.startswith("models--"):
            folder = folder.with_name(repo.rpartition("--")[2])
        return unicode_name(folder.name)

    @property
    def source(self) -> str:
        """The checkpoint's origin, for errors."""
        return str(self.path)

    @property
    def fingerprint(self) -> str:
        """A text that changes when a shard's size or time changes, and so with the weights."""
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
        return sorted({file for piece in self._slices.values() for file in piece.files})

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def locate(self, name: str) -> Slice:
        """Where the tensor `name` lies; a CheckpointError is raised if it is missing."""
        try:
            return self._slices[name]
        except KeyError:
            raise CheckpointError(f"{self.source} has no tensor {name}") from None

    def check(self, tensors: Iterable[TensorSpec]) -> None:
        """Raise a CheckpointError if a source of `tensors` is missing or has another shape."""
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
        """Raise a CheckpointError that names a tensor which the model has no place for, if any."""
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
        return self._floats(self.locate(name))

    def read_start(self, name: str, count: int) -> NDArray[np.float32]:
        """The first `count` weights of a tensor as float32, or all if it has fewer, without scales.

        Raises:
            CheckpointError: the tensor is missing or cannot be read.
        """
        piece = self.locate(name)
        return self._floats(piece.part(0, (min(count, prod(piece.shape)),)))

    def _floats(self, piece: Slice) -> NDArray[np.float32]:
        out = np.empty(piece.shape, np.float32)
        to_float32(self._bytes(piece), piece.dtype, out)
        multiply_scales(out, piece, np.arange(len(out)))
        return out

    def _bytes(self, piece: Slice) -> NDArray[np.uint8]:
        raw = np.empty(piece.nbytes, np.uint8)
        try:
            with open(piece.file, "rb") as file:
                read_exactly(file.fileno(), raw, piece.offset, piece.file)
        except OSError as error:
            raise CheckpointError(f"cannot read {piece.file}: {error.strerror}") from None
        return raw


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing, is unreadable, or does not hold a JSON object.
    """
    try:
        data = path.read_bytes()
        refuse_pointer(path, data[:POINTER_START], CheckpointError)
        value = parse_json(data)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is this a Hugging Face checkpoint?") from None
    except (OSError, ValueError) as error:
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
