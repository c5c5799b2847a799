"""A KV cache in a file: the engine's own format, and a footer that says what it belongs to.

llama.cpp trusts such a file: it does not notice another model's cache, and some damage ends the
process. So the footer binds the cache to the model, the context, the types of keys and
values and the tokens, and has a hash of the engine's part. A file that does not match is not read.
"""

import ctypes
import hashlib
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread
from typing import BinaryIO

import msgspec
from llama_cpp import llama_cpp as llama

from dots1_local.engine import log as engine_log
from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.digest import BLOCK, hash_model, hash_range
from dots1_local.files.partial_file import check_space, open_partial
from dots1_local.progress import Progress, silent

__all__ = [
    "AnswerTokens", "KVState", "drop_state", "kv_binding", "opened_state", "restore_state",
    "save_state",
]  # fmt: skip

# For each answer of a conversation the tokens that the model wrote, where they are known.
AnswerTokens = Sequence[Sequence[int] | None]

_MAGIC = struct.pack("<2I", llama.LLAMA_STATE_SEQ_MAGIC, llama.LLAMA_STATE_SEQ_VERSION)
_END = struct.Struct("<Q8s")  # length of the footer's JSON, _SIGNATURE
_SIGNATURE = b"dots1-kv"
_MAX_FOOTER = 1 << 26  # bytes
_CELL_BYTES = 16  # of a token and its cell, which come before keys and values
_SEQUENCE = 0
_INTERVAL = 0.2  # seconds between two reports of progress


class _Footer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    binding: str
    tokens: list[int]
    answers: list[list[int] | None]
    hash: str  # of the engine's part


@dataclass(frozen=True)
class KVState:
    """An open file whose first `nbytes` are the engine's cache of `tokens`.

    `answers` has what the file claims to be the tokens of the conversation's answers.
    """

    file: BinaryIO
    nbytes: int
    tokens: list[int]
    answers: AnswerTokens


@contextmanager
def opened_state(path: Path, engine: Engine) -> Iterator[KVState | None]:
    """Open a state that this engine can resume from; None if the file is missing or unfit."""
    try:
        file = _open(path)
    except (OSError, ValueError):
        yield None
        return
    with file:
        try:
            state = _checked(file, engine)
        except (OSError, ValueError, struct.error, msgspec.MsgspecError, RecursionError):
            state = None
        yield state


def kv_binding(engine: Engine) -> str:
    """Hash what the cache was computed with: the model and what changes its keys and values.

    The model counts as `hash_model` says.
    """
    gguf, kv_type = engine.gguf, engine.params.kv_type.upper()
    rotation = os.environ.get("LLAMA_ATTN_ROT_DISABLE", "")  # of quantised keys and values
    settings = version("llama-cpp-python"), engine.n_ctx, kv_type, rotation
    digest = hashlib.sha256(repr(settings).encode())
    hash_model(digest, gguf)
    return digest.hexdigest()


def restore_state(state: KVState, engine: Engine) -> bool:
    """Load a state into sequence 0 of the engine; if that fails, the cache is empty."""
    tokens, count = (llama.llama_token * len(state.tokens))(), ctypes.c_size_t()
    with engine.call(), engine_log.capture():
        read = llama.llama_state_seq_load_file(
            engine.context, _name(state.file), _SEQUENCE, tokens, len(tokens), ctypes.byref(count)
        )
    restored = read == state.nbytes and list(tokens) == state.tokens
    if not restored:
        engine.forget()
    return restored


def save_state(
    path: Path,
    engine: Engine,
    tokens: Sequence[int],
    answers: AnswerTokens = (),
    progress: Progress = silent,
) -> int:
    """Write the cache of sequence 0, which holds `tokens`; return the bytes written.

    The file is written whole or not at all. If `path` is a link, it stays one.

    Raises:
        UsageError: another kind of file would be overwritten.
        Dots1Error: the disk has no room for the cache, or the file cannot be written.
    """
    if os.path.lexists(path) and not _begins_as_state(path):
        raise UsageError(f"{path} is not a saved KV cache; choose another name")
    try:
        return _replace(Path(os.path.realpath(path)), engine, tokens, answers, progress)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Dots1Error(f"cannot write {path}: {reason}") from None


def drop_state(path: Path) -> None:
    """Remove a state file if possible; another kind of file stays."""
    if _begins_as_state(path):
        with suppress(OSError):
            Path(os.path.realpath(path)).unlink()


def _open(path: Path) -> BinaryIO:
    if not path.is_file():  # opening a pipe would block
        raise OSError
    return path.open("rb")


def _begins_as_state(path: Path) -> bool:
    try:
        with _open(path) as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except (OSError, ValueError):
        return False


def _checked(file: BinaryIO, engine: Engine) -> KVState | None:
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - _END.size))
    length, signature = _END.unpack(file.read())
    nbytes = size - _END.size - length
    if signature != _SIGNATURE or length > _MAX_FOOTER or nbytes < len(_MAGIC):
        return None
    file.seek(nbytes)
    footer = msgspec.json.decode(file.read(length), type=_Footer)
    if not 0 < len(footer.tokens) <= engine.n_ctx or footer.binding != kv_binding(engine):
        return None
    if footer.hash != _hash(file, nbytes, len(footer.tokens)):
        return None
    return KVState(file, nbytes, footer.tokens, footer.answers)


def _hash(file: BinaryIO, nbytes: int, n_tokens: int) -> str:
    """Hash the engine's part: tokens and cells whole, and blocks spread over keys and values."""
    digest = hashlib.sha256()
    hash_range(digest, file, min(nbytes, BLOCK + _CELL_BYTES * n_tokens), nbytes)
    return digest.hexdigest()


def _replace(
    path: Path, engine: Engine, tokens: Sequence[int], answers: AnswerTokens, progress: Progress
) -> int:
    room = llama.llama_state_seq_get_size(engine.context, _SEQUENCE) + 4 * len(tokens)
    written = [None if answer is None else list(answer) for answer in answers]
    with open_partial(path, private=True) as file:
        check_space(path, room, [path], what="the KV cache")
        if shutil.disk_usage(path.parent).free < room:  # the disk cannot hold both files
            path.unlink(missing_ok=True)
        with _watched(file, room, progress):
            nbytes = _write(file, engine, tokens)
        footer = _Footer(
            kv_binding(engine), list(tokens), written, _hash(file, nbytes, len(tokens))
        )
        text = msgspec.json.encode(footer)
        file.seek(nbytes)
        file.write(text + _END.pack(len(text), _SIGNATURE))
    return nbytes


def _write(file: BinaryIO, engine: Engine, tokens: Sequence[int]) -> int:
    array = (llama.llama_token * len(tokens))(*tokens)
    with engine.call(), engine_log.capture() as log:
        nbytes: int = llama.llama_state_seq_save_file(
            engine.context, _name(file), _SEQUENCE, array, len(tokens)
        )
    # llama.cpp does not check whether its last bytes arrive.
    if not nbytes or os.fstat(file.fileno()).st_size != nbytes:
        raise OSError(0, log.cause().removeprefix("error saving sequence state file: "))
    return nbytes


def _name(file: BinaryIO) -> bytes:
    """A path that opens this very file, whatever its name stands for by now."""
    return b"/proc/self/fd/%d" % file.fileno()


@contextmanager
def _watched(file: BinaryIO, total: int, progress: Progress) -> Iterator[None]:
    """Report the size of the file while llama.cpp writes it."""
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
