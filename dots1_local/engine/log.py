"""What llama.cpp logs: kept out of the terminal, what we need of it kept for ourselves.

That is its complaints, for our error messages, and the sizes of the buffers that it allocates.
"""

import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llama_cpp import llama_cpp as llama

__all__ = ["Errors", "errors", "recent"]

_ERROR = 4  # GGML_LOG_LEVEL_ERROR; the binding's own table is of an older llama.cpp
_lines: deque[str] = deque(maxlen=64)
_sizes: deque[str] = deque(maxlen=1024)


class Errors:
    """The complaints logged since a `with errors()` began, and the lines on buffers' sizes."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.sizes: list[str] = []

    def last(self) -> str:
        """The most telling one: the first error, which later ones only repeat in other words."""
        return self.lines[0] if self.lines else "it did not say why"


@contextmanager
def errors() -> Iterator[Errors]:
    """Collect the errors that calls into llama.cpp log in this block."""
    # Each time: whoever else uses llama.cpp in this process may have set a callback since.
    llama.llama_log_set(_keep, None)
    found = Errors()
    _lines.clear()
    _sizes.clear()
    try:
        yield found
    finally:
        found.lines, found.sizes = list(_lines), list(_sizes)


def recent() -> list[str]:
    """The last complaints, the newest at the end: for a call that never returns."""
    return list(_lines)


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _keep(level: int, text: bytes, _: Any) -> None:
    if level != _ERROR and b" buffer size = " not in text:
        return
    line = text.decode("utf-8", errors="replace").strip()
    if line:
        kept = _lines if level == _ERROR else _sizes
        kept.append(re.sub(r"^\w+: +", "", line))  # the C++ function's name says nothing
