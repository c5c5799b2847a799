"""The files of a conversion: names, headers, and the place of every tensor in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from gguf.gguf_writer import SHARD_NAME_FORMAT, WriterState

from dots1_local.files.partial_file import partial_path
from dots1_local.quant.plan import PlannedTensor

__all__ = ["Output", "TensorSlot", "aligned_bytes", "lay_out"]

ALIGNMENT = 32


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor's bytes go."""

    tensor: PlannedTensor
    file: int
    offset: int


@dataclass(frozen=True)
class Output:
    """One GGUF, in one file or several: headers, names and the place of every tensor.

    `target` is the name that the user gave; if there are several files, their `paths` derive from
    it.
    """

    target: Path
    paths: tuple[Path, ...]
    headers: tuple[bytes, ...]
    sizes: tuple[int, ...]
    slots: tuple[TensorSlot, ...]

    @property
    def path(self) -> Path:
        """The path to load: the file, or its first shard."""
        return self.paths[0]

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes)

    @property
    def partials(self) -> tuple[Path, ...]:
        return tuple(map(partial_path, self.paths))


def lay_out(
    path: Path, writer: GGUFWriter, tensors: Sequence[PlannedTensor], split_max_size: int | None
) -> Output:
    """Serialise the headers with `writer`, which holds the keys, and place every tensor."""
    writer.split_max_size = split_max_size or 0
    for tensor in tensors:
        spec, kind = tensor.spec, tensor.kind
        writer.add_tensor_info(spec.name, spec.shape, np.float32, tensor.nbytes, kind.ggml)
    writer.split_max_size = 0  # the tensors are placed, and it would warn of a single file
    headers = _headers(writer)
    count = len(headers)
    names = [SHARD_NAME_FORMAT.format(path.stem, i + 1, count) for i in range(count)]
    paths = tuple(path.with_name(name) for name in names) if count > 1 else (path,)
    shard_of = {name: i for i, shard in enumerate(writer.tensors) for name in shard}
    ends = [len(header) for header in headers]
    slots = []
    for tensor in tensors:
        file = shard_of[tensor.spec.name]
        slots.append(TensorSlot(tensor, file, ends[file]))
        ends[file] += aligned_bytes(tensor)
    return Output(path, paths, headers, tuple(ends), tuple(slots))


def aligned_bytes(tensor: PlannedTensor) -> int:
    """Return the bytes that a tensor takes in the file, with padding."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _headers(writer: GGUFWriter) -> tuple[bytes, ...]:
    files = [BytesIO() for _ in writer.tensors]
    writer.fout, writer.state = files, WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return tuple(_aligned(file.getvalue()) for file in files)


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)
