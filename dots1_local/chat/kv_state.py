"""Which model it is, told from its headers, its size and samples of its weights.

The file that a KV cache is kept in: the engine's own format, and a footer that says whose it is.

The engine reads such a file in good faith: one that is cut short ends the process, cells may lie
anywhere, and whether it is another model's cache it cannot tell. So a file is looked through first.

Writes an engine's KV cache to a file and reads it back, without a copy in Python's memory.
"""

import ctypes
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread
from typing import Any, BinaryIO

import numpy as np
from llama_cpp import llama_cpp as llama

from dots1_local.engine import log as engine_log
from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.gguf import GGUFFile
from dots1_local.files.partial_file import check_space
from dots1_local.progress import Progress, silent

__all__ = [
    "Answers",
    "State",
    "begins_as_state",
    "drop_state",
    "footer",
    "hash_samples",
    "model_identity",
    "opened_state",
    "restore_state",
    "save_state",
]


_BLOCK = 1 << 16  # bytes
_BLOCKS = 64  # of each file: 4 MB, half a second of a disk that seeks


def model_identity(gguf: GGUFFile) -> str:
    """A hash that tells models apart, in less than a second for one of any size.

    It is of every shard's header and length, and of blocks spread over its weights.

    Raises:
        OSError: a file is gone, or cannot be read.
    """
    digest = hashlib.sha256()
    for path in gguf.files:
        size = path.stat().st_size
        weights = _weights_begin(gguf, path, size)
        with path.open("rb") as file:
            digest.update(file.read(weights))
            hash_samples(digest, file, weights, size)
    return digest.hexdigest()


def hash_samples(digest: Any, file: BinaryIO, start: int, end: int) -> None:
    """Feed it the length of a range of a file, and blocks from its beginning to its very end."""
    digest.update((end - start).to_bytes(8, "little"))
    last = max(start, end - _BLOCK)
    for number in range(_BLOCKS):
        file.seek(start + (last - start) * number // (_BLOCKS - 1))
        digest.update(file.read(min(_BLOCK, end - start)))


def _weights_begin(gguf: GGUFFile, path: Path, size: int) -> int:
    return min((tensor.offset for tensor in gguf.tensors if tensor.file == path), default=size)


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


_SEQUENCE = 0
_INTERVAL = 0.2  # seconds between two reports


def save_state(
    path: Path,
    engine: Engine,
    tokens: Sequence[int],
    answers: Answers = (),
    progress: Progress = silent,
) -> int:
    """Write the cache of sequence 0, which is of `tokens`, whole or not at all; bytes written.

    Where `path` is a link, it stays one.

    Raises:
        UsageError: another kind of file would be overwritten.
        Dots1Error: the disk has no room for it, or it cannot be written there.
    """
    if os.path.lexists(path) and not begins_as_state(path):
        raise UsageError(f"{path} is no saved KV cache; it stays as it is, choose another name")
    try:
        return _replace(Path(os.path.realpath(path)), engine, tokens, answers, progress)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Dots1Error(f"cannot write {path}: {reason}") from None


def drop_state(path: Path) -> None:
    """Remove such a file, as far as that is possible; another kind of file stays."""
    if begins_as_state(path):
        with suppress(OSError):
            Path(os.path.realpath(path)).unlink()


def restore_state(state: State, engine: Engine) -> bool:
    """Put it into sequence 0 of the engine; if that fails, nothing is cached."""
    tokens, count = (llama.llama_token * len(state.tokens))(), ctypes.c_size_t()
    with engine_log.errors():
        read = llama.llama_state_seq_load_file(
            engine.context, _name(state.file), _SEQUENCE, tokens, len(tokens), ctypes.byref(count)
        )
    restored = read == state.nbytes and list(tokens) == state.tokens
    if not restored:
        engine.forget()
    return restored


def _replace(
    path: Path, engine: Engine, tokens: Sequence[int], answers: Answers, progress: Progress
) -> int:
    partial = path.with_name(f"{path.name}.partial")
    room = llama.llama_state_seq_get_size(engine.context, _SEQUENCE) + 4 * len(tokens)
    try:
        partial.unlink(missing_ok=True)
        _make_room(path, room)
        with open(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+b") as file:
            with _watched(file, room, progress):
                nbytes = _write(file, engine, tokens)
            end = footer(file, nbytes, engine, answers)
            file.seek(nbytes)
            file.write(end)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return nbytes


def _make_room(path: Path, nbytes: int) -> None:
    """For a file beside the one it replaces, or if there is no room for both, without that."""
    check_space(path, nbytes, [path], what="the KV cache")
    if shutil.disk_usage(path.parent).free < nbytes:
        path.unlink(missing_ok=True)


def _write(file: BinaryIO, engine: Engine, tokens: Sequence[int]) -> int:
    array = (llama.llama_token * len(tokens))(*tokens)
    with engine_log.errors() as errors:
        nbytes: int = llama.llama_state_seq_save_file(
            engine.context, _name(file), _SEQUENCE, array, len(tokens)
        )
    # The engine does not look whether its last bytes arrive.
    if not nbytes or os.fstat(file.fileno()).st_size != nbytes:
        raise OSError(0, errors.last().removeprefix("error saving sequence state file: "))
    return nbytes


def _name(file: BinaryIO) -> bytes:
    """What the engine opens: this very file, whatever its name may stand for by now."""
    return b"/proc/self/fd/%d" % file.fileno()


@contextmanager
def _watched(file: BinaryIO, total: int, progress: Progress) -> Iterator[None]:
    """Report how much of the file is there, as the engine does not."""
    ended = Event()

    def watch() -> None:
        while not ended.wait(_INTERVAL):
            progress(os.fstat(file.fileno()).st_size, total, "bytes", "")

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
