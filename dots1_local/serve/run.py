"""The whole server: HTTP in one thread, the engine in another, signals in the main thread."""

import ipaddress
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from threading import Event, Thread
from typing import Any, Self

import uvicorn

from dots1_local.chat.draft import Draft
from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error
from dots1_local.serve.http.app import BACKLOG, IDLE_SECONDS, Connection, make_app, raise_file_limit
from dots1_local.serve.http.model import Model
from dots1_local.serve.http.service import Service
from dots1_local.serve.placement_report import engine_placement
from dots1_local.serve.prompt_cache import PromptCache
from dots1_local.serve.scheduler import Scheduler

__all__ = ["ApiServer", "bind", "is_loopback", "url_of"]

_KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # seconds, and probes
_LOOK = 0.5  # seconds after which a signal that another thread got is heard
_CLOSING_SECONDS = 5  # for connections to close after the last answer
_FLUSHING_SECONDS = 1  # for errors to reach clients when the process has to end


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; port 0 takes any free port.

    Raises:
        Dots1Error: this machine does not have the address, or the port is taken or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except socket.gaierror as error:
        reason = error.strerror
    except UnicodeError:
        reason = "this is not a host name"
    except OSError as error:
        reason = os.strerror(error.errno or 0)
    else:
        _keep_alive(listener)
        # asyncio does so for sockets of its own only. Without it, the body of an answer waits for
        # the client's receipt of the head, which a client delays by 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    raise Dots1Error(f"cannot listen at {host}, port {port}: {reason}")


def _keep_alive(listener: socket.socket) -> None:
    """Let the system probe for clients that have vanished; connections inherit the setting."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if option := getattr(socket, name, None):
            listener.setsockopt(socket.IPPROTO_TCP, option, value)


def is_loopback(listener: socket.socket) -> bool:
    """Return whether only programs on this machine can connect."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def url_of(listener: socket.socket) -> str:
    """Return the base URL for clients."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


class ApiServer:
    """Serves HTTP from its own thread, even while the model loads; use it with `with`."""

    def __init__(
        self,
        listener: socket.socket,
        name: str,
        *,
        api_key: str | None = None,
        origins: Sequence[str] = (),
        page: bool = True,
    ) -> None:
        self._stop = Event()
        self._listener = listener
        self._service = Service(name)
        app = make_app(self._service, api_key=api_key, origins=origins, page=page)
        self._http = uvicorn.Server(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=Connection,
                backlog=BACKLOG,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # lower levels report what clients do wrong
                access_log=False,
                timeout_keep_alive=IDLE_SECONDS,
                server_header=False,
                headers=[("X-Content-Type-Options", "nosniff")],
                proxy_headers=False,
            )
        )
        self._thread = Thread(target=self._run, name="dots1-http", daemon=True)
        self._scheduler: Scheduler | None = None

    def __enter__(self) -> Self:
        raise_file_limit()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(0)

    def open(self, engine: Engine, queue_size: int, draft: Draft, cache: PromptCache) -> None:
        """Begin to answer with an engine, which nothing else may use until `close` returns."""
        placement = engine_placement(engine)  # before the engine begins to compute
        self._scheduler = Scheduler(
            engine,
            queue_size=queue_size,
            draft=draft,
            cache=cache,
            on_end=self._stop.set,
        )
        self._service.open(Model(engine, self._service.name), self._scheduler, placement)

    @property
    def busy(self) -> bool:
        """Whether answers are being generated or are waiting."""
        load = self._scheduler and self._scheduler.load
        return bool(load and (load.running or load.waiting))

    def wait(self) -> None:
        """Return at Ctrl-C or SIGTERM, which do not end the process meanwhile.

        Raises:
            Dots1Error: the HTTP thread or the engine's thread has ended by itself.
        """
        with _set_by_signals(self._stop):
            # Linux may give a signal to another thread. That does not wake this one, which is the
            # one that handles it.
            while not self._stop.wait(_LOOK):
                pass
        if not self._thread.is_alive():
            raise Dots1Error("the HTTP side of the server has failed; start it again")
        if self._scheduler and self._scheduler.failed:
            raise Dots1Error("the engine has failed and cannot continue; start the server again")

    def close(self, timeout: float) -> bool:
        """Refuse new requests, finish what can be finished in `timeout` seconds, fail the rest.

        Return whether the engine is free then; if not, a step of it takes more than 5 seconds. A
        second call does nothing.
        """
        self._service.close()
        self._http.config.timeout_graceful_shutdown = ceil(timeout) + _CLOSING_SECONDS
        self._http.should_exit = True
        free = not self._scheduler or self._scheduler.close(timeout)
        if not free:
            self.abort("the server is shutting down")
        self._thread.join(timeout + 2 * _CLOSING_SECONDS)
        self._service.join()
        return free

    def abort(self, reason: str) -> None:
        """Fail all requests although the engine does not return, and let clients hear of it."""
        self._service.close()
        if self._scheduler:
            self._scheduler.abort(reason)
        self._http.config.timeout_graceful_shutdown = _FLUSHING_SECONDS
        self._http.should_exit = True
        self._thread.join(2 * _FLUSHING_SECONDS)

    def _run(self) -> None:
        try:
            self._http.run([self._listener])
        finally:
            self._stop.set()


@contextmanager
def _set_by_signals(event: Event) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM set an event instead of ending the process."""

    def handle(number: int, frame: Any) -> None:
        event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
