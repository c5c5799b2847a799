"""The file that a KV cache is kept in: the engine's own format, and a footer that says whose it is.

The engine reads such a file in good faith: one that is cut short ends the process, cells may lie
anywhere, and whether it is another model's cache it cannot tell. So a file is looked through first.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from llama_cpp import llama_cpp as llama

from dots1_local.runtime.chat.model_identity import hash_samples, model_identity
from dots1_local.runtime.engine import Engine

__all__ = ["Answers", "State", "begins_as_state", "footer", "opened_state"]

# For each answer of a conversation the tokens that the model wrote, where they are known.
Answers = Sequence[Sequence[int] | None]

_MAGIC = struct.pack("<2I", llama.LLAMA_STATE_SEQ_MAGIC, llama.LLAMA_STATE_SEQ_VERSION)
_HEADER_BYTES = len(_MAGIC) + 4  # then come the tokens, so many of them as it says
_END = struct.Struct("<Q8s")  # length of the footer's JSON, _SIGNATURE
_SIGNATURE = b"dots1-kv"
_LARGEST_FOOTER = 1 << 24  # bytes
_MOST_LAYERS = 1 << 10


@dataclass(frozen=True)
class State:
    """A state of `nbytes` that the engine can be trusted with; `answers` are only a claim."""

    file: BinaryIO
    nbytes: int
    tokens: list[int]
    answers: list[Any]


class _Unusable(Exception):
    """The file is damaged, or of something else."""


def footer(file: BinaryIO, nbytes: int, engine: Engine, answers: Answers) -> bytes:
    """What follows the `nbytes` that the engine wrote."""
    content = {
        **_binding(engine),
        "samples": _samples(file, nbytes),
        "answers": [None if answer is None else list(answer) for answer in answers],
    }
    text = json.dumps(content).encode()
    return text + _END.pack(len(text), _SIGNATURE)


def begins_as_state(path: Path) -> bool:
    """Whether it could be a state, if maybe a damaged one."""
    try:
        with _open(path) as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except (OSError, ValueError):
        return False


@contextmanager
def opened_state(path: Path, engine: Engine) -> Iterator[State | None]:
    """A state that this engine can go on from; None where there is none, for whatever reason."""
    try:
        file = _open(path)
    except (OSError, ValueError):
        yield None
        return
    with file:
        try:
            state = _checked(file, engine)
        except (_Unusable, OSError, ValueError, struct.error, RecursionError):
            state = None
        yield state


def _open(path: Path) -> BinaryIO:
    if not path.is_file():  # a pipe would be waited for
        raise OSError
    return path.open("rb")


def _binding(engine: Engine) -> dict[str, Any]:
    """What the cache was computed with; the engine itself compares types and shapes."""
    return {
        "model": model_identity(engine.gguf),
        "engine": version("llama-cpp-python"),
        "context": engine.n_ctx,
        "kv_type": engine.settings.kv_type.upper(),
        "rotation": os.environ.get("LLAMA_ATTN_ROT_DISABLE", ""),  # of quantised keys and values
    }


def _samples(file: BinaryIO, nbytes: int) -> str:
    digest = hashlib.sha256()
    hash_samples(digest, file, 0, nbytes)
    return digest.hexdigest()


def _checked(file: BinaryIO, engine: Engine) -> State:
    size = os.fstat(file.fileno()).st_size
    length, signature = _END.unpack(_read_at(file, max(0, size - _END.size), _END.size))
    nbytes = size - _END.size - length
    if signature != _SIGNATURE or length > _LARGEST_FOOTER or nbytes < 0:
        raise _Unusable
    found = json.loads(_read_at(file, nbytes, length))
    if not isinstance(found, dict) or not isinstance(found.get("answers"), list):
        raise _Unusable
    tokens = _tokens(file, nbytes, engine)
    for key, value in {**_binding(engine), "samples": _samples(file, nbytes)}.items():
        if found.get(key) != value:
            raise _Unusable
    return State(file, nbytes, tokens, found["answers"])


def _tokens(file: BinaryIO, nbytes: int, engine: Engine) -> list[int]:
    """The tokens of a state that has its cells in order and ends where it must."""
    magic, count = struct.unpack(f"<{len(_MAGIC)}sI", _read_at(file, 0, _HEADER_BYTES))
    if magic != _MAGIC or not 0 < count <= engine.n_ctx:
        raise _Unusable
    tokens = np.frombuffer(_read(file, 4 * count), "<i4")
    if tokens.min() < 0 or tokens.max() >= engine.n_vocab:
        raise _Unusable
    if struct.unpack("<2I", _read(file, 8)) != (1, count):  # streams, cells
        raise _Unusable
    cells = np.frombuffer(_read(file, 12 * count), "<i4").reshape(count, 3)
    one_sequence = np.stack([np.arange(count), np.ones(count), np.zeros(count)], axis=1)
    if not np.array_equal(cells, one_sequence):  # position, number of sequences, which
        raise _Unusable
    _check_length(file, count, nbytes)
    return [int(token) for token in tokens]


def _check_length(file: BinaryIO, count: int, nbytes: int) -> None:
    """Whether the layers' keys and values, of `count` cells, end at `nbytes`."""
    transposed, n_layers = struct.unpack("<2I", _read(file, 8))
    if transposed > 1 or not 0 < n_layers <= _MOST_LAYERS:
        raise _Unusable
    position = file.tell()
    for layer in range(2 * n_layers):  # all keys, then all values
        if transposed and layer >= n_layers:
            _, element, width = struct.unpack("<iII", _read_at(file, position, 12))
            row = element * width
        else:
            _, row = struct.unpack("<iQ", _read_at(file, position, 12))
        position += 12 + row * count
        if position > nbytes:
            raise _Unusable
    if position != nbytes:
        raise _Unusable


def _read_at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return _read(file, count)


def _read(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise _Unusable
    return data
