"""GGUF files as others write them: gguf-py copies one, with some keys and tensors changed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

Data = NDArray[Any]


def rewrite(
    source: Path,
    target: Path,
    values: Mapping[str, Any] | None = None,
    remove: Sequence[str] = (),
    types: Mapping[str, GGUFValueType] | None = None,
    edit: Mapping[str, Callable[[Data], Data]] | None = None,
) -> Path:
    """Copy `source` with `values` set and keys or tensors in `remove` left out.

    `edit` gives a tensor other data, in its stored form (rows of bytes for quantised ones).
    """
    reader = GGUFReader(source)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    values, types, edit = dict(values or {}), types or {}, edit or {}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in remove:
            continue
        value = values.pop(name, field.contents())
        kind = types.get(name, field.types[0])
        writer.add_key_value(name, value, kind, field.types[-1] if len(field.types) > 1 else None)
    for name, value in values.items():
        writer.add_key_value(name, value, types[name])
    for tensor in reader.tensors:
        if tensor.name not in remove:
            data = edit.get(tensor.name, lambda data: data)(np.array(tensor.data))
            kept = data.dtype == np.uint8
            kind = GGMLQuantizationType(tensor.tensor_type)
            writer.add_tensor(tensor.name, data, raw_dtype=kind if kept else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def fields(path: Path) -> dict[str, tuple[list[GGUFValueType], Any]]:
    """Types and values of all keys, in the file's order, as gguf-py reads them."""
    found = GGUFReader(path).fields.items()
    return {n: (f.types, f.contents()) for n, f in found if not n.startswith("GGUF.")}


def tensor_bytes(path: Path) -> dict[str, bytes]:
    """The stored bytes of every tensor, as gguf-py reads them."""
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}
