"""What happens when llama.cpp ends the process: save first, and say why in one sentence.

llama.cpp calls abort() when it loses a worker or a device fails, from any of its threads, and
prints a backtrace. Within `on_abort` it calls functions of ours instead, and the exit code is 1.
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

__all__ = ["AbortHandler", "explain", "on_abort"]

AbortHandler = Callable[[str], None]  # is given the sentence that says what happened

_TIMEOUT = 10  # seconds for a handler, which may wait for an engine that no longer answers
_SOURCE = re.compile(r"^.*?:\d+: ")  # file and line of the C++ source
_DEVICE_ERROR = re.compile(
    r"(?:CUDA|ROCm|MUSA) error: (.+)|ggml_vulkan: (device (?:lost|fault) .+)"
)
_EXCEPTION = re.compile(r"N?(\d+)")  # a mangled name is made of names after their lengths
_handlers: list[AbortHandler] = []
_ending = Lock()


@contextmanager
def on_abort(handler: AbortHandler) -> Iterator[None]:
    """Call `handler` if llama.cpp ends the process within this block.

    Handlers of inner blocks come first. A handler runs in a thread of its own while everything else
    stands still. It must not use the engine, and it has 10 seconds. The exit code is 1.
    """
    base = library()
    replaced = [_replace(base, name, function) for name, function in _HOOKS.items()]
    _handlers.append(handler)
    try:
        yield
    finally:
        _handlers.remove(handler)
        for name, function in zip(_HOOKS, replaced, strict=True):
            _replace(base, name, function)


def explain(message: str, log: Sequence[str] = ()) -> str:
    """A sentence for llama.cpp's message when it aborts; `log` are the errors that it logged."""
    message = _SOURCE.sub("", message).strip()
    if message.startswith("Remote RPC server crashed"):
        return "the connection to a worker was lost: look there why it ended, and start it again"
    if match := re.match(r"(?:Failed to connect to|RPC handshake failed for) (\S+)", message):
        return f"the worker at {match[1]} does not answer; look there, and start dots1 worker again"
    found = [match[1] or match[2] for match in map(_DEVICE_ERROR.search, reversed(log)) if match]
    if message.startswith("vk::OutOf") or (found and "out of memory" in found[0]):
        return "the GPU ran out of memory while it computed: plan again with less --vram"
    if found:
        return f"the GPU failed ({found[0]}); start the program again to use it"
    details = "; ".join(filter(None, (message, *log[-1:])))
    return "llama.cpp failed and cannot continue" + (details and f": {details}")


def _aborted(message: bytes) -> None:
    _end(message.decode("utf-8", errors="replace"))


def _uncaught() -> None:
    """Handle a C++ exception that nobody caught; only its type is known here."""
    _end(_exception_type())


def _exception_type() -> str:
    """The type of the C++ exception that is being handled, such as vk::DeviceLostError, or ""."""
    function = getattr(library(), "__cxa_current_exception_type", None)
    if function is None:
        return ""
    function.argtypes, function.restype = [], ctypes.POINTER(ctypes.c_char_p)
    found = function()  # a std::type_info: its vtable, and the mangled name
    return _demangled(found[1].decode("ascii", errors="replace")) if found else ""


def _demangled(name: str) -> str:
    """A class's name without templates, such as vk::SystemError for N2vk11SystemErrorE."""
    parts, rest = [], name
    while match := _EXCEPTION.match(rest):
        end = match.end() + int(match[1])
        parts.append(rest[match.end() : end])
        rest = rest[end:]
    return "::".join(parts) or name


# Functions that install a handler and return the one before, and our handlers. The second one is
# std::set_terminate, by its name on Linux and macOS.
_HOOKS: dict[str, Any] = {
    "ggml_set_abort_callback": ctypes.CFUNCTYPE(None, ctypes.c_char_p)(_aborted),
    "_ZSt13set_terminatePFvvE": ctypes.CFUNCTYPE(None)(_uncaught),
}


def _replace(base: ctypes.CDLL, name: str, handler: Any) -> ctypes.c_void_p | None:
    install = getattr(base, name, None)
    if install is None:
        return None
    install.argtypes, install.restype = [ctypes.c_void_p], ctypes.c_void_p
    return ctypes.c_void_p(install(ctypes.cast(handler, ctypes.c_void_p)))


def _end(message: str) -> None:
    """Call the handlers and end the process; a second thread that aborts waits for that."""
    if not _ending.acquire(blocking=False):
        Event().wait()
    from dots1_local.engine.log import recent_errors

    sentence = explain(message, recent_errors())
    try:
        for handler in reversed(_handlers):
            thread = Thread(target=_call, args=(handler, sentence), daemon=True)
            thread.start()
            thread.join(_TIMEOUT)
    finally:  # even if no thread can be started
        os._exit(1)


def _call(handler: AbortHandler, sentence: str) -> None:
    with suppress(BaseException):
        handler(sentence)
    for stream in (sys.stdout, sys.stderr):
        with suppress(BaseException):
            stream.flush()
