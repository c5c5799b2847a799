"""A GGUF model, in one file or several: its keys, its tensors with their roles, and their bytes."""

import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Self

from dots1_local.architecture import Role
from dots1_local.errors import GGUFError
from dots1_local.files.gguf_header import GGUFHeader, GGUFTensor
from dots1_local.files.gguf_keys import Change, Keys, Value, pack_key, pack_string

if TYPE_CHECKING:  # numpy takes 100 ms, which verbs like `dots1 inspect` do without
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "SHARD", "GGUFFile", "GGUFTensor", "OpenFiles", "Value", "cores", "pack_key", "pack_string",
    "role_of",
]  # fmt: skip

SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")

_ROLES: dict[str, Role] = {
    "token_embd": "embedding",
    "output": "head",
    "output_norm": "norm",
    **dict.fromkeys(("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"), "norm"),
    **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), "attention"),
    **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), "dense"),
    **dict.fromkeys(("ffn_gate_inp", "exp_probs_b"), "router"),
    **dict.fromkeys(("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"), "shared"),
    **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), "routed"),
}


@cache
def role_of(name: str) -> Role | None:
    """The role of a GGUF tensor by its name; None if no dots1 model has such a tensor."""
    match = re.fullmatch(r"(?:blk\.\d+\.)?(\w+)\.(?:weight|bias)", name)
    return _ROLES.get(match[1]) if match else None


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF model: the headers of its files, its tensors, and the keys of its first file.

    `changes` are those that `corrected` has made in memory; the files have other keys.
    """

    headers: tuple[GGUFHeader, ...]
    tensors: tuple[GGUFTensor, ...]
    changes: tuple[Change, ...] = ()

    @classmethod
    def open(cls, path: str | Path) -> "GGUFFile":
        """Read the header at `path`, which may be any shard of a split file.

        Raises:
            GGUFError: a file is missing, is not a GGUF file, is truncated, or contradicts itself or
                the other shards.
        """
        path = Path(path)
        header = GGUFHeader.read(path)
        count = header.keys.get("split.count", 1)
        _check_not_joined(header)
        if not isinstance(count, int) or count <= 1:
            return cls((header,), header.tensors)
        shards = _shards(path, count)
        headers = tuple(header if file == path else GGUFHeader.read(file) for file in shards)
        for each in headers:
            _check_not_joined(each)
        return cls.of(headers)

    @classmethod
    def of(cls, headers: Sequence[GGUFHeader]) -> "GGUFFile":
        """Join the headers of all shards, in their order.

        Raises:
            GGUFError: they contradict each other.
        """
        if len(headers) > 1:
            _check_split(headers)
        return cls(tuple(headers), tuple(tensor for each in headers for tensor in each.tensors))

    def corrected(self, changes: Sequence[Change]) -> "GGUFFile":
        """The same model with other keys in memory; its files stay as they are."""
        first = replace(self.headers[0], keys=self.keys.changed(changes))
        return replace(self, headers=(first, *self.headers[1:]), changes=(*self.changes, *changes))

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(header.file for header in self.headers)

    @property
    def keys(self) -> Keys:
        return self.headers[0].keys

    @property
    def nbytes(self) -> int:
        """Size of all files together."""
        return sum(header.size for header in self.headers)


def _shards(path: Path, count: int) -> tuple[Path, ...]:
    match = SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise GGUFError(
            f"{path} is one of {count} shards but is not named NAME-00001-of-{count:05}.gguf; "
            "give it its name back"
        )
    names = (f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))
    files = tuple(path.with_name(name) for name in names)
    for file in files:
        if not file.exists():
            raise GGUFError(f"shard {file} is missing; fetch all {count} shards of the model")
    return files


def _check_not_joined(header: GGUFHeader) -> None:
    """Refuse a file in which another GGUF file follows, as `cat` makes of shards."""
    ends = (tensor.offset + tensor.nbytes for tensor in header.tensors)
    end = header.aligned(max(ends, default=header.data_start))
    with header.file.open("rb") as file:
        file.seek(end)
        follows = file.read(4)
    if follows == b"GGUF":
        raise GGUFError(
            f"{header.file} is several GGUF files one after another, of which llama.cpp reads the "
            "first: fetch the shards of the model again, and name any of them, without joining them"
        )


def _check_split(headers: Sequence[GGUFHeader]) -> None:
    count = len(headers)
    for number, header in enumerate(headers):
        if (header.keys.get("split.no"), header.keys.get("split.count")) != (number, count):
            raise GGUFError(f"{header.file} is not shard {number + 1} of {count} of one model")
    names = [tensor.name for header in headers for tensor in header.tensors]
    first = headers[0]
    promised = first.keys.get("split.tensors.count", len(names))
    if promised != len(names):
        raise GGUFError(
            f"{first.file} promises {promised} tensors in all shards, which hold {len(names)}"
        )
    if len(set(names)) != len(names):
        raise GGUFError(f"two shards of {first.file} hold a tensor of the same name")


def cores() -> int:
    """Cores this process may use; in a container these are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OpenFiles:
    """Files that many threads read, held open until the `with` statement ends.

    Each thread has buffers of its own, which it keeps.
    """

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for fd in self._open.values():
            os.close(fd)

    def read(self, path: Path, offset: int, count: int) -> "NDArray[np.uint8]":
        """Bytes of a GGUF file, valid until the thread reads again.

        Raises:
            GGUFError: the file ends early or cannot be read.
        """
        from dots1_local.files.safetensors import read_exactly

        buffer = self.buffer("stored", count)
        try:
            read_exactly(self.descriptor(path), buffer, offset, path, GGUFError)
        except OSError as error:
            raise GGUFError(f"cannot read {path}: {error.strerror}") from None
        return buffer

    def descriptor(self, path: Path) -> int:
        """The file's descriptor; the file is opened at first use."""
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
            return self._open[path]

    def buffer(self, name: str, size: int) -> "NDArray[np.uint8]":
        """The calling thread's memory of this name; its contents are undefined."""
        import numpy as np

        held: NDArray[np.uint8] | None = getattr(self._local, name, None)
        if held is None or held.size < size:
            held = np.empty(size, np.uint8)
            setattr(self._local, name, held)
        return held[:size]
