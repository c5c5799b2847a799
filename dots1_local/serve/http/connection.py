"""uvicorn's connections, bounded in number and in how long they may be without a request."""

import asyncio
import resource

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["BACKLOG", "IDLE_SECONDS", "Connection", "allow_files"]

BACKLOG = 128  # connections that asyncio accepts at once
IDLE_SECONDS = 60  # clients close idle connections sooner
_MOST, _FEWEST = 1000, 32
_FILES = 2048
_SPARE = 4 * BACKLOG  # file descriptors for connections not yet closed, and everything else


def allow_files() -> None:
    """Raise the process's limit of open files to what its connections need, as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Connection(H11Protocol):
    """One connection; one too many is closed at once.

    uvicorn itself lets a new connection be silent for ever, and a header come byte by byte.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _most():
            transport.abort()
        else:
            self._expect_header()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._expect_header()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _expect_header(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(IDLE_SECONDS, self.timeout_keep_alive_handler)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _most() -> int:
    """How many there may be; out of descriptors, asyncio fails to accept any and fills the log."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if files == resource.RLIM_INFINITY else min(_MOST, max(_FEWEST, files - _SPARE))
