"""One HTTP request to a server and its answer as it arrives, with waiting that can be given up.

The request runs in a thread: looking up a name or connecting cannot be interrupted where it
happens. The caller waits in short steps, so Ctrl-C is heard within a tenth of a second.
"""

import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from queue import Empty, Full, Queue
from threading import Event, Thread
from time import monotonic
from typing import Any, Self

import httpx2

from dots1_local.chat.remote.address import is_loopback
from dots1_local.errors import Dots1Error, readable

__all__ = ["StreamingRequest", "Wake"]

Wake = Callable[[], None]  # called while nothing arrives; an exception from it ends the waiting

_CONNECT_SECONDS = 10
_WAKE_SECONDS = 0.1
_PARTS_AHEAD = 16  # a server that is faster than its reader has to wait
_LARGEST = 1 << 22  # bytes of one event, or of an answer that is not streamed
_LAST_EVENT = "[DONE]"


class _Left(Exception):
    """The `with` block was left; nobody waits for the answer any more."""


class StreamingRequest:
    """A request that is under way; leaving its `with` block closes the connection.

    While waiting, `wake` is called ten times a second. With `timeout`, waiting for the head or for
    one part of the body ends after that many seconds. Proxies that the
    environment names are used. Redirects are not followed: they would take a key to another host.
    Errors name the server by its address `server`.

    Raises:
        Dots1Error: the connection fails or breaks, the timeout is over, or the answer is not HTTP.
    """

    def __init__(
        self,
        request: httpx2.Request,
        wake: Wake,
        timeout: float | None = None,
        *,
        server: str,
    ) -> None:
        self._request, self._wake, self._timeout = request, wake, timeout
        self._server = server
        self._arrived: Queue[Any] = Queue(_PARTS_AHEAD)
        self._left = Event()
        self._socket: socket.socket | None = None
        request.extensions["trace"] = self._note_socket

    def __enter__(self) -> Self:
        Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()
        self._shut_down()

    def head(self) -> httpx2.Response:
        """Wait for status and headers; read the body with `parts` only."""
        head: httpx2.Response = self._next()
        return head

    def parts(self) -> Iterator[bytes]:
        """Yield the data of each server-sent event, or else the whole body as one part.

        Events end with [DONE] or with the stream. Of a body that is too long, only the beginning is
        read.
        """
        while (part := self._next()) is not None:
            yield part

    def _next(self) -> Any:
        begun = monotonic()
        while True:
            self._wake()
            try:
                found = self._arrived.get(timeout=_WAKE_SECONDS)
            except Empty:
                if self._timeout is not None and monotonic() - begun > self._timeout:
                    seconds = f"{self._timeout:g} seconds"
                    raise Dots1Error(f"{self._server} does not answer within {seconds}") from None
                continue
            if isinstance(found, Exception):
                raise _connection_error(found, self._server) from found
            return found

    def _run(self) -> None:
        """Send the request in the thread; `_next` raises the exceptions."""
        with suppress(_Left):
            try:
                self._receive()
            except Exception as error:
                self._hand_over(error)

    def _receive(self) -> None:
        url = self._request.url
        tls = url.scheme == "https"  # loading certificates takes 20 ms
        with (
            httpx2.Client(
                verify=tls,
                # A proxy would take localhost for itself.
                transport=httpx2.HTTPTransport(verify=tls) if is_loopback(url) else None,
                timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
            ) as client,
            closing(client.send(self._request, stream=True)) as response,
        ):
            response.encoding = "utf-8-sig"
            self._hand_over(response)
            for part in _parts_of(response):
                self._hand_over(part)
        self._hand_over(None)

    def _hand_over(self, found: httpx2.Response | bytes | Exception | None) -> None:
        while not self._left.is_set():
            with suppress(Full):
                self._arrived.put(found, timeout=_WAKE_SECONDS)
                return
        raise _Left

    def _note_socket(self, event: str, details: Mapping[str, Any]) -> None:
        """Keep the socket of a new connection, which `__exit__` shuts down to wake the thread."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._socket = details["return_value"].get_extra_info("socket")
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if self._left.is_set():
                self._shut_down()

    def _shut_down(self) -> None:
        if (connected := self._socket) is not None:
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)


def _parts_of(response: httpx2.Response) -> Iterator[bytes]:
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if response.status_code == 200 and kind == "text/event-stream":
        for event in httpx2.EventSource(response, _LARGEST):
            if event.data == _LAST_EVENT:
                return
            if event.data:
                yield event.data.encode()
        return
    body = bytearray()
    for piece in response.iter_bytes():
        body += piece
        if len(body) >= _LARGEST:
            break
    yield bytes(body[:_LARGEST])


def _connection_error(error: BaseException, url: str) -> Dots1Error:
    """Say in one sentence why a request to `url` failed, and what to do."""
    root = error
    while not isinstance(root, OSError) and (below := root.__cause__ or root.__context__):
        root = below
    match root:
        case socket.gaierror():
            reason = f"the host of {url} is not known; check --url and the network"
        case ConnectionRefusedError():
            reason = f"nobody listens at {url}; start the server, or check --url"
        case TimeoutError():
            reason = f"{url} cannot be reached within {_CONNECT_SECONDS} seconds"
        case ssl.SSLCertVerificationError():
            reason = (
                f"the certificate of {url} is not trusted: {readable(root.verify_message)}; "
                "SSL_CERT_FILE can name a file of trusted authorities"
            )
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER" | "RECORD_LAYER_FAILURE"):
            reason = f"{url} does not speak TLS; try http:// instead of https://"
        case OSError() if not isinstance(root, ConnectionError):
            reason = f"cannot reach {url}: {readable(root.strerror or str(root))}"
        case _ if isinstance(error, httpx2.SSEError):
            reason = f"{url} sends an event without end"
        case _ if isinstance(root, ConnectionError) or "closed connection" in str(error):
            reason = f"the connection to {url} was cut"
        case _:
            reason = f"cannot use {url}; is it an HTTP server? {readable(str(error))}"
    return Dots1Error(reason)
