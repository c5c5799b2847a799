"""When the engine ends the process: what was not saved is saved first, and one sentence told.

llama.cpp calls abort() over a lost worker or an error of a device, from whatever thread notices,
and prints a backtrace. Here that ends in functions of ours, and then with exit code 1.
"""

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event, Lock, Thread
from typing import Any

from dots1_local.ggml import library

__all__ = ["Rescue", "explain", "handling"]

Rescue = Callable[[str], None]  # given the sentence that says what happened

_PATIENCE = 10  # seconds a rescue may take: it may wait for an engine that is no more
_WHERE = re.compile(r"^.*?:\d+: ")  # file and line of the C++ source
_DEVICE_ERROR = re.compile(r"(?:CUDA|ROCm|MUSA) error: (.+)")
_rescues: list[Rescue] = []
_ending = Lock()


@contextmanager
def handling(rescue: Rescue) -> Iterator[None]:
    """Have `rescue` called should the engine end the process in this block.

    The innermost block's comes first. It runs in a thread of its own while everything else stands
    still, must not use the engine, and is given up after 10 seconds. The exit code is 1.
    """
    base = library()
    replaced = [_replace(base, name, handler) for name, handler in _HANDLERS.items()]
    _rescues.append(rescue)
    try:
        yield
    finally:
        _rescues.remove(rescue)
        for name, handler in zip(_HANDLERS, replaced, strict=True):
            _replace(base, name, handler)


def explain(message: str, log: Sequence[str] = ()) -> str:
    """A sentence for what the engine says when it aborts; `log` is what it complained of before."""
    message = _WHERE.sub("", message).strip()
    if message.startswith("Remote RPC server crashed"):
        return (
            "the connection to a worker was lost: look there for why it ended, and start dots1 "
            "worker again"
        )
    if match := re.match(r"(?:Failed to connect to|RPC handshake failed for) (\S+)", message):
        return f"the worker at {match[1]} does not answer; look there, and start dots1 worker again"
    found = [match[1] for match in map(_DEVICE_ERROR.search, reversed(log)) if match]
    if found and "out of memory" in found[0]:
        return "the GPU ran out of memory while it computed: plan again with less --vram"
    if found:
        return f"the GPU failed ({found[0]}); nothing more can be computed there until a new start"
    details = "; ".join(filter(None, (message, *log[-1:])))
    return "llama.cpp failed in a way that it cannot go on from" + (details and f": {details}")


def _aborted(message: bytes) -> None:
    _end(message.decode("utf-8", errors="replace"))


def _uncaught() -> None:
    """A C++ exception that nobody caught, of which no more is known here."""
    _end("")


# What replaces a handler and returns the one before: ours. The second is std::set_terminate, as
# compilers name it on Linux and macOS.
_HANDLERS: dict[str, Any] = {
    "ggml_set_abort_callback": ctypes.CFUNCTYPE(None, ctypes.c_char_p)(_aborted),
    "_ZSt13set_terminatePFvvE": ctypes.CFUNCTYPE(None)(_uncaught),
}


def _replace(base: ctypes.CDLL, name: str, handler: Any) -> ctypes.c_void_p | None:
    function = getattr(base, name, None)
    if function is None:
        return None
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
    return ctypes.c_void_p(function(ctypes.cast(handler, ctypes.c_void_p)))


def _end(message: str) -> None:
    """Call the rescues and end the process; whoever comes second waits for that."""
    if not _ending.acquire(blocking=False):
        Event().wait()
    from dots1_local.engine import log as engine_log

    sentence = explain(message, engine_log.recent())
    try:
        for rescue in reversed(_rescues):
            thread = Thread(target=_attempt, args=(rescue, sentence), daemon=True)
            thread.start()
            thread.join(_PATIENCE)
    finally:  # also where there is no thread to be had
        os._exit(1)


def _attempt(rescue: Rescue, sentence: str) -> None:
    with suppress(BaseException):
        rescue(sentence)
    for stream in (sys.stdout, sys.stderr):
        with suppress(BaseException):
            stream.flush()
