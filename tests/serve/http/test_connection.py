import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from threading import Thread
from typing import Any

import pytest
import uvicorn

from dots1_local.serve.http import app as connection
from dots1_local.serve.run import bind

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answer after the whole body."""
    while (await receive())["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


@pytest.fixture
def port() -> Iterator[int]:
    config = uvicorn.Config(
        application, http=connection.Connection, lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    with closing(bind("127.0.0.1", 0)) as listener:
        thread = Thread(target=server.run, args=([listener],))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(60)


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IDLE_SECONDS", 0.05)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def answered(client: socket.socket, request: bytes = HEAD + b"body") -> bool:
    with suppress(ConnectionError):
        client.sendall(request)
        return client.recv(100).startswith(b"HTTP/1.1 204")
    return False


def test_answers_do_not_wait_for_the_receipt_of_their_head() -> None:
    with closing(bind("127.0.0.1", 0)) as listener, connect(listener.getsockname()[1]):
        served, _ = listener.accept()
        with served:
            assert served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHos"])
@pytest.mark.usefixtures("short_timeout")
def test_a_silent_connection_is_closed(port: int, sent: bytes) -> None:
    with connect(port) as client:
        client.sendall(sent)
        while client.recv(100):
            pass


@pytest.mark.usefixtures("short_timeout")
def test_a_connection_with_a_slow_header_is_closed(port: int) -> None:
    with connect(port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nx: ")
        client.settimeout(0.01)
        for _ in range(1000):
            with suppress(TimeoutError):
                client.sendall(b"x")
                assert client.recv(1) == b""
                break
        else:
            raise AssertionError("the connection stayed open")


@pytest.mark.usefixtures("short_timeout")
def test_a_body_may_arrive_slowly(port: int) -> None:
    with connect(port) as client, connect(port) as silent:
        client.sendall(HEAD + b"bo")
        assert silent.recv(1) == b""  # the silent connection has been closed
        assert answered(client, b"dy")


def test_connections_beyond_the_limit_are_closed(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_MAX_CONNECTIONS", 2)
    with connect(port) as first, connect(port) as second:
        assert answered(first)
        assert answered(second)
        with connect(port) as third:
            assert not answered(third)
        assert answered(first)


def test_the_limit_depends_on_the_limit_of_open_files(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (connection._OTHER_FILES + 40, 0))
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(port)) for _ in range(40)]
        assert all(map(answered, clients))
        with connect(port) as another:
            assert not answered(another)


def test_clients_that_vanish_are_noticed() -> None:
    with closing(bind("127.0.0.1", 0)) as listener, connect(listener.getsockname()[1]):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
