"""Writes an engine's KV cache to a file and reads it back, without a copy in Python's memory."""

import ctypes
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import BinaryIO

from llama_cpp import llama_cpp as llama

from dots1_local.errors import Dots1Error, UsageError
from dots1_local.output import check_space
from dots1_local.progress import Progress, silent
from dots1_local.runtime import engine_log
from dots1_local.runtime.chat.kv_state_file import Answers, State, begins_as_state, footer
from dots1_local.runtime.engine import Engine

__all__ = ["drop_state", "restore_state", "save_state"]

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
