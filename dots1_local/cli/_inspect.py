"""`dots1 inspect`: show what a GGUF file or a checkpoint holds."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dots1_local.cli._options import Json, argument, flag, verb
from dots1_local.cli._output import plural, print_json, print_sizes, print_table
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from dots1_local.files.inspection import InspectedTensor, Inspection

__all__ = ["InspectOptions", "inspect"]

_MAX_ITEMS = 4
_MAX_CHARACTERS = 120


@dataclass(frozen=True)
class InspectOptions:
    path: Path = argument("A GGUF file, any shard of a split one, or a checkpoint's folder.")
    tensors: bool = flag("List every tensor with its type, shape and size.", "--tensors")
    keys: bool = flag("List the metadata keys; long values are abbreviated.", "--keys")
    json: Json = False


@verb
def inspect(options: InspectOptions) -> None:
    """Show what a model file holds, summed up by the role of its tensors.

    dots1 inspect dots1-Q4_K_M.gguf

    dots1 inspect --tensors checkpoint/
    """
    from dots1_local.files.inspection import inspect_path

    inspection = inspect_path(options.path)
    if options.json:
        print_json(_as_json(inspection))
        return
    _print_summary(inspection)
    if options.tensors:
        print()
        rows: Iterable[Sequence[str]] = (
            (t.name, t.role, t.type, "×".join(map(str, t.shape)), human_bytes(t.nbytes))
            for t in inspection.tensors
        )
        print_table(("tensor", "role", "type", "shape", "bytes"), rows, numbers_from=3)
    if options.keys:
        print()
        rows = ((key, _abbreviate(value)) for key, value in inspection.keys.items())
        print_table(("key", "value"), rows, numbers_from=2)


def _print_summary(inspection: "Inspection") -> None:
    count = inspection.parameters
    parameters = f"{count / 1e9:.3f} B" if count >= 1e9 else f"{count / 1e6:.3f} M"
    print(
        f"{inspection.path}: {inspection.architecture} {inspection.kind}, "
        f"{plural(len(inspection.files), 'file')}, {human_bytes(inspection.nbytes)} of tensors, "
        f"{parameters} parameters, {inspection.bpw:.3f} bits per weight\n"
    )
    print_sizes((each.role, each.type, each.parameters, each.nbytes) for each in inspection.tensors)


def _abbreviate(value: Any) -> str:
    """Return a value on one line as JSON, which escapes a file's control characters."""
    if isinstance(value, list) and len(value) > _MAX_ITEMS:
        shown = ", ".join(map(_abbreviate, value[:_MAX_ITEMS]))
        return f"[{shown}, … {len(value):,} in all]"
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > _MAX_CHARACTERS:
        return f"{text[:_MAX_CHARACTERS]}… ({len(text):,} characters)"
    return text


def _as_json(inspection: "Inspection") -> dict[str, Any]:
    return {
        "path": str(inspection.path),
        "kind": inspection.kind,
        "architecture": inspection.architecture,
        "files": list(inspection.files),
        "parameters": inspection.parameters,
        "bytes": inspection.nbytes,
        "bpw": inspection.bpw,
        "roles": _by_role(inspection.tensors),
        "tensors": [asdict(tensor) for tensor in inspection.tensors],
        "keys": dict(inspection.keys),
    }


def _by_role(tensors: "Iterable[InspectedTensor]") -> dict[str, dict[str, int]]:
    sums: dict[str, dict[str, int]] = {}
    for each in tensors:
        role = sums.setdefault(each.role, {"tensors": 0, "parameters": 0, "bytes": 0})
        role["tensors"] += 1
        role["parameters"] += each.parameters
        role["bytes"] += each.nbytes
    return sums
