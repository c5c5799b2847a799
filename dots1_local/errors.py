"""The kinds of errors that a caller can tell apart.

Every message is one sentence that says what is wrong, where, and what to do about it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "CheckpointError", "Dots1Error", "GGUFError", "UsageError", "memory_errors", "readable",
]  # fmt: skip


class Dots1Error(Exception):
    """Base of all errors about bad input; the command line exits with `exit_code`."""

    exit_code = 1


class UsageError(Dots1Error):
    """The request itself is wrong, such as an unknown type or contradictory options."""

    exit_code = 2


class CheckpointError(Dots1Error):
    """A Hugging Face checkpoint is incomplete, corrupt, or of another architecture."""


class GGUFError(Dots1Error):
    """A GGUF file is missing, is corrupt, or is not what the command needs."""


def readable(text: str, limit: int = 300) -> str:
    """Cut words from elsewhere to one short line without terminal control characters."""
    harmless = "".join(each if each.isprintable() else " " for each in text[: 4 * limit])
    line = " ".join(harmless.split()).rstrip(".")
    return line if len(line) <= limit else f"{line[:limit]}…"


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turn errors of numpy, torch and the system about memory into "not enough memory WHAT".

    Raises:
        Dots1Error: there is too little memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch and threads raise RuntimeError
        known = re.search("out of memory|t allocate memory", str(error))
        if not known and not isinstance(error, MemoryError):
            raise
        raise Dots1Error(f"not enough memory {what}") from None
