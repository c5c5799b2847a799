"""`dots1 inspect`: show what a GGUF file or a checkpoint holds."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dots1_local.cli._options import Json, argument, flag, verb
from dots1_local.cli._output import plural, print_json, print_sizes, print_table
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from dots1_local.files.checkpoint import Checkpoint
    from dots1_local.files.safetensors import Slice

__all__ = ["InspectOptions", "inspect"]

_MAX_ITEMS = 4
_MAX_CHARACTERS = 120


@dataclass(frozen=True)
class InspectOptions:
    path: Path = argument("A GGUF file, any shard of a split one, or a checkpoint's folder.")
    tensors: bool = flag("List every tensor with its type, shape and size.", "--tensors")
    keys: bool = flag("List the metadata keys; long values are abbreviated.", "--keys")
    json: Json = False


@dataclass(frozen=True)
class _StoredTensor:
    """One tensor as it is stored; `role` is "other" for a tensor that no dots1 model has."""

    name: str
    role: str
    type: str
    shape: tuple[int, ...]
    parameters: int
    nbytes: int
    file: str


@dataclass(frozen=True)
class _Model:
    """The contents of a model; `keys` are a GGUF's keys or the object in config.json."""

    path: Path
    kind: Literal["gguf", "checkpoint"]
    architecture: str
    files: tuple[str, ...]
    tensors: tuple[_StoredTensor, ...]
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


@verb
def inspect(options: InspectOptions) -> None:
    """Show what a model file holds, summed up by the role of its tensors.

    dots1 inspect dots1-Q4_K_M.gguf

    dots1 inspect --tensors checkpoint/
    """
    path = options.path
    model = _read_checkpoint(path) if path.is_dir() else _read_gguf(path)
    if options.json:
        print_json(_as_json(model))
        return
    _print_summary(model)
    if options.tensors:
        print()
        rows: Iterable[Sequence[str]] = (
            (t.name, t.role, t.type, "×".join(map(str, t.shape)), human_bytes(t.nbytes))
            for t in model.tensors
        )
        print_table(("tensor", "role", "type", "shape", "bytes"), rows, numbers_from=3)
    if options.keys:
        print()
        rows = ((key, _abbreviate(value)) for key, value in model.keys.items())
        print_table(("key", "value"), rows, numbers_from=2)


def _read_gguf(path: Path) -> _Model:
    from dots1_local.files.gguf import GGUFFile, role_of

    gguf = GGUFFile.open(path)
    tensors = tuple(
        _StoredTensor(
            tensor.name, role_of(tensor.name) or "other", tensor.type, tensor.shape,
            tensor.elements, tensor.nbytes, tensor.file.name,
        )
        for tensor in gguf.tensors
    )  # fmt: skip
    architecture = str(gguf.keys.get("general.architecture", "unknown"))
    files = tuple(file.name for file in gguf.files)
    return _Model(path, "gguf", architecture, files, tensors, gguf.keys)


def _read_checkpoint(folder: Path) -> _Model:
    from dots1_local.architecture import inventory
    from dots1_local.files.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    specs = inventory(checkpoint.config)
    checkpoint.check(specs)
    roles = {source: spec.role for spec in reversed(specs) for source in spec.sources}
    tensors = tuple(
        _StoredTensor(
            name, roles.get(name, "other"), piece.dtype, piece.shape,
            piece.nbytes // piece.item_bytes, piece.nbytes, piece.file.name,
        )
        for name, piece in _stored(checkpoint, roles)
    )  # fmt: skip
    files = tuple(file.name for file in checkpoint.shards)
    return _Model(folder, "checkpoint", "dots1", files, tensors, checkpoint.raw_config)


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


def _print_summary(model: _Model) -> None:
    count = model.parameters
    parameters = f"{count / 1e9:.3f} B" if count >= 1e9 else f"{count / 1e6:.3f} M"
    print(
        f"{model.path}: {model.architecture} {model.kind}, "
        f"{plural(len(model.files), 'file')}, {human_bytes(model.nbytes)} of tensors, "
        f"{parameters} parameters, {model.bpw:.3f} bits per weight\n"
    )
    print_sizes((each.role, each.type, each.parameters, each.nbytes) for each in model.tensors)


def _abbreviate(value: Any) -> str:
    """Return a value on one line as JSON, which escapes a file's control characters."""
    if isinstance(value, list) and len(value) > _MAX_ITEMS:
        shown = ", ".join(map(_abbreviate, value[:_MAX_ITEMS]))
        return f"[{shown}, … {len(value):,} in all]"
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > _MAX_CHARACTERS:
        return f"{text[:_MAX_CHARACTERS]}… ({len(text):,} characters)"
    return text


def _as_json(model: _Model) -> dict[str, Any]:
    return {
        "path": str(model.path),
        "kind": model.kind,
        "architecture": model.architecture,
        "files": list(model.files),
        "parameters": model.parameters,
        "bytes": model.nbytes,
        "bpw": model.bpw,
        "roles": _by_role(model.tensors),
        "tensors": [asdict(tensor) for tensor in model.tensors],
        "keys": dict(model.keys),
    }


def _by_role(tensors: Iterable[_StoredTensor]) -> dict[str, dict[str, int]]:
    sums: dict[str, dict[str, int]] = {}
    for each in tensors:
        role = sums.setdefault(each.role, {"tensors": 0, "parameters": 0, "bytes": 0})
        role["tensors"] += 1
        role["parameters"] += each.parameters
        role["bytes"] += each.nbytes
    return sums
