"""What is in a GGUF file or a checkpoint folder: tensors by role, types, sizes and keys."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dots1_local.architecture import inventory
from dots1_local.files.gguf import GGUFFile, role_of

__all__ = ["InspectedTensor", "Inspection", "inspect_path"]


@dataclass(frozen=True)
class InspectedTensor:
    """One tensor as it is stored; `role` is "other" where no dots1 model has such a tensor."""

    name: str
    role: str
    type: str
    shape: tuple[int, ...]
    parameters: int
    nbytes: int
    file: str


@dataclass(frozen=True)
class Inspection:
    """Everything there is to see; `keys` are a GGUF's keys or the object in config.json."""

    path: Path
    kind: Literal["gguf", "checkpoint"]
    architecture: str
    files: tuple[str, ...]
    tensors: tuple[InspectedTensor, ...]
    keys: Mapping[str, Any]

    @property
    def parameters(self) -> int:
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, headers not counted."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * self.nbytes / max(self.parameters, 1)


def inspect_path(path: str | Path) -> Inspection:
    """Look into a GGUF file (any shard of a split one) or a Hugging Face checkpoint folder.

    Raises:
        GGUFError: not a readable GGUF file.
        CheckpointError: an incomplete or unreadable checkpoint, or of another architecture.
    """
    return _inspect_checkpoint(Path(path)) if Path(path).is_dir() else _inspect_gguf(Path(path))


def _inspect_gguf(path: Path) -> Inspection:
    gguf = GGUFFile.open(path)
    tensors = tuple(
        InspectedTensor(
            tensor.name, role_of(tensor.name) or "other", tensor.type, tensor.shape,
            tensor.elements, tensor.nbytes, tensor.file.name,
        )
        for tensor in gguf.tensors
    )  # fmt: skip
    architecture = str(gguf.keys.get("general.architecture", "unknown"))
    files = tuple(file.name for file in gguf.files)
    return Inspection(path, "gguf", architecture, files, tensors, gguf.keys)


def _inspect_checkpoint(folder: Path) -> Inspection:
    from dots1_local.files.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    specs = inventory(checkpoint.config)
    checkpoint.check(specs)
    roles = {source: spec.role for spec in reversed(specs) for source in spec.sources}
    tensors = tuple(_located(checkpoint, roles))
    files = tuple(file.name for file in checkpoint.shards)
    return Inspection(folder, "checkpoint", "dots1", files, tensors, checkpoint.raw_config)


def _located(checkpoint: Any, roles: Mapping[str, str]) -> Iterator[InspectedTensor]:
    """The tensors of the model, then what else the shards hold."""
    seen = {(piece.file, piece.offset) for piece in map(checkpoint.locate, roles)}
    others: Iterable[str] = (name for name in checkpoint if name not in roles)
    for name in roles:
        yield _from_slice(name, roles[name], checkpoint.locate(name))
    for name in others:
        piece = checkpoint.locate(name)
        # Packed experts begin where the first of the experts read from them does.
        if (piece.file, piece.offset) not in seen:
            yield _from_slice(name, "other", piece)


def _from_slice(name: str, role: str, piece: Any) -> InspectedTensor:
    parameters = piece.nbytes // piece.item_bytes
    return InspectedTensor(
        name, role, piece.dtype, piece.shape, parameters, piece.nbytes, piece.file.name
    )
