"""What happens when llama.cpp, or `watch`, ends the process: save first, and say why in a sentence.

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

__all__ = ["AbortHandler", "end", "explain", "handled", "on_abort", "warn"]

# It is given the sentence that says what happened; outer handlers get what it returns, if anything.
AbortHandler = Callable[[str], str | None]

_TIMEOUT = 10  # seconds for a handler, which may wait for an engine that no longer answers
_SOURCE = re.compile(r"^.*?:\d+: ")  # file and line of the C++ source
_DEVICE_ERROR = re.compile(
    r"(?:CUDA|ROCm|MUSA) error: (.+)|ggml_vulkan: (device (?:lost|fault) .+)"
)
_EXCEPTION = re.compile(r"N?(\d+)")  # a mangled name is made of names after their lengths
_handlers: list[AbortHandler] = []
_warnings: list[Callable[[str], None]] = []
_ending = Lock()


@contextmanager
def on_abort(handler: AbortHandler, warning: Callable[[str], None] | None = None) -> Iterator[None]:
    """Call `handler` if llama.cpp ends the process within this block, or has to be ended.

    Handlers of inner blocks come first. A handler runs in a thread of its own while the engine
    stands still. It must not use the engine, and it has 10 seconds. The exit code is 1, or 130
    after Ctrl-C. `warning` is told, from another thread, what a call into llama.cpp waits for.
    """
    base = library()
    replaced = [_replace(base, name, function) for name, function in _HOOKS.items()]
    _handlers.append(handler)
    warnings = [warning] if warning else []
    _warnings.extend(warnings)
    try:
        yield
    finally:
        _handlers.remove(handler)
        for each in warnings:
            _warnings.remove(each)
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


def _end(message: str) -> None:
    from dots1_local.engine.log import recent_errors

    end(explain(message, recent_errors()))


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


def handled() -> bool:
    """Whether there is a handler, so that the process may be ended."""
    return bool(_handlers)


def warn(sentence: str) -> None:
    """Tell the innermost `warning` what a call into llama.cpp waits for."""
    with suppress(Exception):
        for warning in _warnings[-1:]:
            warning(sentence)


def end(sentence: str, code: int = 1) -> None:
    """Call the handlers and end the process; a second thread that does so waits for that."""
    if not _ending.acquire(blocking=False):
        Event().wait()
    sentences = [sentence]
    try:
        for handler in reversed(_handlers):
            thread = Thread(target=_call, args=(handler, sentences), daemon=True)
            thread.start()
            thread.join(_TIMEOUT)
    finally:  # even if no thread can be started
        os._exit(code)


def _call(handler: AbortHandler, sentences: list[str]) -> None:
    with suppress(BaseException):
        sentences.append(handler(sentences[-1]) or sentences[-1])
    for stream in (sys.stdout, sys.stderr):
        with suppress(BaseException):
            stream.flush()
