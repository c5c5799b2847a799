"""What a model file holds: every tensor with its role, type and size."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dots1_local.architecture import inventory
from dots1_local.files.gguf import GGUFFile, role_of

if TYPE_CHECKING:
    from dots1_local.files.checkpoint import Checkpoint
    from dots1_local.files.safetensors import Slice

__all__ = ["ModelContents", "StoredTensor", "inspect_gguf", "inspect_model"]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it is stored; `role` is "other" for a tensor that no dots1 model has."""

    name: str
    role: str
    type: str
    shape: tuple[int, ...]
    parameters: int
    nbytes: int
    file: str


@dataclass(frozen=True)
class ModelContents:
    """The contents of a model; `keys` are a GGUF's keys or the object in config.json."""

    path: Path
    kind: Literal["gguf", "checkpoint"]
    architecture: str
    files: tuple[str, ...]
    tensors: tuple[StoredTensor, ...]
    keys: Mapping[str, Any]

    @property
    def parameters(self) -> int:
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without headers."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * self.nbytes / max(self.parameters, 1)


def inspect_model(path: Path) -> ModelContents:
    """Read the headers of a GGUF file or of a checkpoint's folder.

    Raises:
        GGUFError, CheckpointError: the file or the folder is incomplete or corrupt.
    """
    return _read_checkpoint(path) if path.is_dir() else inspect_gguf(path, GGUFFile.open(path))


def inspect_gguf(path: Path, gguf: GGUFFile) -> ModelContents:
    """Return the contents of a GGUF file whose header was read; they are called `path`."""
    tensors = tuple(
        StoredTensor(
            tensor.name, role_of(tensor.name) or "other", tensor.type, tensor.shape,
            tensor.elements, tensor.nbytes, tensor.file.name,
        )
        for tensor in gguf.tensors
    )  # fmt: skip
    architecture = str(gguf.keys.get("general.architecture", "unknown"))
    files = tuple(file.name for file in gguf.files)
    return ModelContents(path, "gguf", architecture, files, tensors, gguf.keys)


def _read_checkpoint(folder: Path) -> ModelContents:
    from dots1_local.files.checkpoint import Checkpoint  # imports numpy

    checkpoint = Checkpoint.open(folder)
    specs = inventory(checkpoint.config)
    checkpoint.check(specs)
    roles = {source: spec.role for spec in reversed(specs) for source in spec.sources}
    tensors = tuple(
        StoredTensor(
            name, roles.get(name, "other"), piece.dtype, piece.shape,
            piece.nbytes // piece.item_bytes, piece.nbytes, piece.file.name,
        )
        for name, piece in _stored(checkpoint, roles)
    )  # fmt: skip
    files = tuple(file.name for file in checkpoint.shards)
    return ModelContents(folder, "checkpoint", "dots1", files, tensors, checkpoint.raw_config)


def _stored(checkpoint: "Checkpoint", roles: Mapping[str, str]) -> "Iterator[tuple[str, Slice]]":
    """Yield the tensors of the model, then those that the shards hold besides."""
    seen = set()
    for name in roles:
        piece = checkpoint.locate(name)
        seen.add((piece.file, piece.offset))
        yield name, piece
    for name in checkpoint:
        piece = checkpoint.locate(name)
        # Packed experts begin where the first of the experts read from them does.
        if name not in roles and (piece.file, piece.offset) not in seen:
            yield name, piece
