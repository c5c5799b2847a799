"""One HTTP request and its answer, in a thread of its own so that waiting can always be given up.

Looking up a name, connecting and a server's reading of a prompt may all take long, and cannot be
interrupted where they happen; Ctrl-C should be heard at once all the same.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from functools import partial
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from queue import Empty, Full, Queue
from threading import Event, Thread
from time import monotonic
from typing import Any, Self
from urllib.error import HTTPError
from urllib.request import (
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    build_opener,
)

from dots1_local.chat.remote.connection import CONNECT_SECONDS, connection_failure
from dots1_local.errors import Dots1Error

__all__ = ["Exchange", "Head", "Wake"]

Wake = Callable[[], None]  # called while nothing comes; an exception from it ends the waiting

_WAKE_SECONDS = 0.1
_PIECE = 1 << 16  # bytes
_PIECES_AHEAD = 64  # a server that is faster than its reader has to wait


class _Left(Exception):
    """The `with` block was left; nobody waits for the answer any more."""


@dataclass(frozen=True)
class Head:
    """What comes before the body."""

    status: int
    headers: Message

    @property
    def kind(self) -> str:
        """The body's media type."""
        return self.headers.get_content_type()


class Exchange:
    """A request under way; leaving its `with` block closes the connection.

    While waiting, `wake` is called ten times a second. With `patience`, waiting for the head or for
    one piece of the body ends after so many seconds. `proxies` allows the environment's proxies.
    Errors name the server by `url`.

    Raises:
        Dots1Error: the connection cannot be made or breaks, nothing comes in time, or what comes is
            no HTTP.
    """

    def __init__(
        self,
        request: Request,
        wake: Wake,
        patience: float | None = None,
        *,
        url: str,
        proxies: bool = True,
    ) -> None:
        self._request, self._wake, self._patience = request, wake, patience
        self._url, self._proxies = url, proxies
        self._arrived: Queue[Head | bytes | Exception] = Queue(_PIECES_AHEAD)
        self._left = Event()
        self._socket: socket.socket | None = None

    def __enter__(self) -> Self:
        Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()
        if (connected := self._socket) is not None:
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closes it

    def head(self) -> Head:
        """Status and headers, once they have come."""
        head = self._next()
        assert isinstance(head, Head)
        return head

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes."""
        while piece := self._next():
            assert isinstance(piece, bytes)
            yield piece

    def body(self, limit: int) -> bytes:
        """The body, or of a longer one the first `limit` bytes."""
        found = b""
        for piece in self.pieces():
            found += piece
            if len(found) >= limit:
                break
        return found[:limit]

    def _next(self) -> Head | bytes:
        begun = monotonic()
        while True:
            self._wake()
            try:
                found = self._arrived.get(timeout=_WAKE_SECONDS)
            except Empty:
                if self._patience is not None and monotonic() - begun > self._patience:
                    waited = f"{self._patience:g} seconds"
                    raise Dots1Error(f"{self._url} does not answer within {waited}") from None
                continue
            if isinstance(found, Exception):
                raise connection_failure(found, self._url) from found
            return found

    def _run(self) -> None:
        """What the thread does; `_next` raises its exceptions."""
        with suppress(_Left):
            try:
                self._receive()
            except Exception as error:
                self._hand_over(error)

    def _receive(self) -> None:
        with self._response() as response:
            self._hand_over(Head(response.status, response.headers))
            while piece := response.read1(_PIECE):
                self._hand_over(piece)
        self._hand_over(b"")

    def _response(self) -> Any:
        """An `HTTPResponse`, or the `HTTPError` that stands for one with an error status."""
        try:
            return self._opener().open(self._request, timeout=CONNECT_SECONDS)
        except HTTPError as error:
            return error

    def _opener(self) -> OpenerDirector:
        """An opener that follows no redirect, which would take a key along to another host."""
        others = [] if self._proxies else [ProxyHandler({})]
        return build_opener(_Connecting(self._connected), _NoRedirect(), *others)

    def _connected(self, connection: HTTPConnection) -> None:
        """Note a new connection, and let it be silent for as long as a prompt takes to read."""
        self._socket = connection.sock
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self._left.is_set():
            raise _Left

    def _hand_over(self, found: Head | bytes | Exception) -> None:
        while not self._left.is_set():
            with suppress(Full):
                self._arrived.put(found, timeout=_WAKE_SECONDS)
                return
        raise _Left


Noted = Callable[[HTTPConnection], None]


class _Connection(HTTPConnection):
    """A connection that calls `noted` as soon as it is made."""

    def __init__(self, noted: Noted, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._noted = noted

    def connect(self) -> None:
        super().connect()
        self._noted(self)


class _TlsConnection(_Connection, HTTPSConnection):
    """The same over TLS, which calls `noted` after the handshake."""


class _Connecting(HTTPHandler, HTTPSHandler):
    def __init__(self, noted: Noted) -> None:
        super().__init__()
        self._noted = noted

    def http_open(self, req: Request) -> HTTPResponse:
        return self.do_open(partial(_Connection, self._noted), req)

    def https_open(self, req: Request) -> HTTPResponse:
        return self.do_open(partial(_TlsConnection, self._noted), req)


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None
