"""How long work reports its progress: through one callback, because the library never prints."""

from typing import Protocol

__all__ = ["Progress", "silent"]


class Progress(Protocol):
    """Called with the running total; `unit` is "bytes", "tokens", ..., `what` the current item."""

    def __call__(self, done: int, total: int, unit: str, what: str) -> None: ...


def silent(done: int, total: int, unit: str, what: str) -> None:
    """Ignore progress."""
