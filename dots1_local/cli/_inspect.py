"""`dots1 inspect`: show what a GGUF file, a checkpoint or a calibration holds."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dots1_local.cli._model import find_model
from dots1_local.cli._options import Json, argument, flag, option, verb
from dots1_local.cli._output import one_line, plural, print_json, print_sizes, print_table
from dots1_local.cli._routing import inspect_routing
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from dots1_local.files.inspection import ModelContents, StoredTensor

__all__ = ["InspectOptions", "inspect"]

_MAX_ITEMS = 4
_MAX_CHARACTERS = 120


@dataclass(frozen=True, eq=False, repr=False)
class InspectOptions:
    path: Path = argument(
        "A GGUF file, any shard of a split one, ORG/NAME[:TYPE] on the Hugging Face hub, or the "
        "folder of a checkpoint or a calibration."
    )
    tensors: bool = flag("List every tensor with its type, shape and size.", "--tensors")
    keys: bool = flag("List the metadata keys; long values are abbreviated.", "--keys")
    svg: Path | None = option(
        "Draw a calibration's hit rates by cache size to this file.", metavar="FILE"
    )
    json: Json = False


@verb
def inspect(options: InspectOptions) -> None:
    """Show what a model file holds, summed up by the role of its tensors.

    Of a calibration, show which experts its text used, and what a cache of experts would hit.

    dots1 inspect dots1-Q4_K_M.gguf

    dots1 inspect --tensors checkpoint/

    dots1 inspect calibrated/ --svg hits.svg
    """
    from dots1_local.files.inspection import inspect_gguf, inspect_model

    if _is_calibration(options.path):
        inspect_routing(options.path, options.svg, json=options.json)
        return
    if options.svg is not None:
        raise typer.BadParameter("only a calibration has hit rates to draw", param_hint="--svg")
    remote = find_model(options.path)
    model = inspect_gguf(options.path, remote.header()) if remote else inspect_model(options.path)
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


def _is_calibration(path: Path) -> bool:
    if not path.is_dir() or (path / "config.json").exists():  # a checkpoint may have an imatrix
        return False
    from dots1_local.calibrate.manifest import IMATRIX, MANIFEST, ROUTING

    results = (MANIFEST, ROUTING, IMATRIX)
    return any((path / name).exists() for name in results)


def _print_summary(model: "ModelContents") -> None:
    count = model.parameters
    parameters = f"{count / 1e9:.3f} B" if count >= 1e9 else f"{count / 1e6:.3f} M"
    print(
        f"{model.path}: {model.architecture} {model.kind}, "
        f"{plural(len(model.files), 'file')}, {human_bytes(model.nbytes)} of tensors, "
        f"{parameters} parameters, {model.bpw:.3f} bits per weight"
    )
    if refinement := _refinement(model.keys):
        print(refinement)
    print()
    print_sizes((each.role, each.type, each.parameters, each.nbytes) for each in model.tensors)


def _refinement(keys: Mapping[str, Any]) -> str | None:
    """Say what the weights were refined with, if they were."""
    tokens = keys.get("dots1_local.refinement.tokens")
    if not isinstance(tokens, int):
        return None
    datasets = keys.get("dots1_local.refinement.datasets")
    source = f" of {one_line(datasets)}" if isinstance(datasets, str) else ""
    return f"refined with {tokens:,} tokens{source}"


def _abbreviate(value: Any) -> str:
    """Return a value on one line as JSON, which escapes a file's control characters."""
    if isinstance(value, list) and len(value) > _MAX_ITEMS:
        shown = ", ".join(map(_abbreviate, value[:_MAX_ITEMS]))
        return f"[{shown}, … {len(value):,} in all]"
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > _MAX_CHARACTERS:
        return f"{text[:_MAX_CHARACTERS]}… ({len(text):,} characters)"
    return text


def _as_json(model: "ModelContents") -> dict[str, Any]:
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


def _by_role(tensors: "Iterable[StoredTensor]") -> dict[str, dict[str, int]]:
    sums: dict[str, dict[str, int]] = {}
    for each in tensors:
        role = sums.setdefault(each.role, {"tensors": 0, "parameters": 0, "bytes": 0})
        role["tensors"] += 1
        role["parameters"] += each.parameters
        role["bytes"] += each.nbytes
    return sums
