import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from threading import Thread

import pytest

from dots1_local.devices.rpc import parse_endpoint, probe
from dots1_local.errors import Dots1Error, UsageError
from tests.workers import Worker, free_port, local_worker

HELLO = struct.pack("<QBBBB24x", 28, 7, 0, 0, 0)  # as llama.cpp's rpc_msg_hello_rsp, 7.0.0

Script = Callable[[socket.socket], None]
Host = Callable[[Script], str]


@pytest.fixture
def host() -> Iterator[Host]:
    """Starts a server that runs `script` with one connection; returns its endpoint."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def make(script: Script) -> str:
            def run() -> None:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    script(connection)

            Thread(target=run, daemon=True).start()
            return f"127.0.0.1:{listener.getsockname()[1]}"

        yield make


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with local_worker() as started:
        yield started


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("10.0.0.2:50052", "10.0.0.2:50052"),
        ("Box.local", "box.local:50052"),
        (" gpu-box:080 ", "gpu-box:80"),
        ("localhost:65535", "localhost:65535"),
    ],
)
def test_an_endpoint_is_a_host_and_a_port(text: str, endpoint: str) -> None:
    assert parse_endpoint(text) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        *("", ":50052", "box:", "box:0", "box:65536", "box:-1", "box:９", "box:1e3"),
        *("box:" + "9" * 5000, "[::1]:50052", "::1", "[::1]", "http://box:80"),
        *("a b:1", "büro:1", "box\n:1", "-x:1"),
    ],
)
def test_refuses_what_is_not_an_address(text: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        parse_endpoint(text)


def test_a_worker_stays_usable(worker: Worker) -> None:
    for _ in range(3):
        probe([worker.endpoint])


def test_names_an_endpoint_where_nobody_listens() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    with pytest.raises(Dots1Error, match=f"{endpoint}.*dots1 worker"):
        probe([endpoint])


def test_names_an_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise socket.gaierror(name)

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    with pytest.raises(Dots1Error, match="host 'box'"):
        probe(["box:1"])


def test_gives_up_on_a_slow_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: time.sleep(60))
    with pytest.raises(Dots1Error, match="host 'box'"):
        probe(["box:1"], timeout=0.1)


def send(*pieces: bytes) -> Script:
    """Answers each request with the next piece, and closes after the last."""

    def script(connection: socket.socket) -> None:
        for piece in pieces:
            connection.recv(4096)
            connection.sendall(piece)

    return script


def flood(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"\xff" * 65536)


def trickle(connection: socket.socket) -> None:
    for byte in HELLO:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (send(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "not a worker"),
        (flood, "not a worker"),
        (send(b""), "closes the connection"),
        (send(HELLO[:20]), "closes the connection"),
        (trickle, "does not answer"),
        (lambda connection: time.sleep(5), "does not answer.*another client"),
        (send(HELLO.replace(b"\x07", b"\x06")), "6.0.0 .*7.0.0"),
        (send(HELLO, b""), "is gone"),
        (send(HELLO, struct.pack("<QI", 4, 0)), "0 devices"),
        (send(HELLO, struct.pack("<QI", 4, 1 << 31)), "2,147,483,648 devices"),
        (send(HELLO, struct.pack("<QI", 1 << 60, 1)), "another version"),
    ],
)
def test_says_why_a_worker_is_not_usable(host: Host, script: Script, message: str) -> None:
    endpoint = host(script)
    with pytest.raises(Dots1Error, match=message) as error:
        probe([endpoint], timeout=0.5)
    assert endpoint in str(error.value)


def test_a_worker_that_resets_the_connection(host: Host) -> None:
    def reset(connection: socket.socket) -> None:
        connection.recv(1)  # the rest is left unread
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with pytest.raises(Dots1Error, match=r"lost 127\.0\.0\.1|closes the connection"):
        probe([host(reset)], timeout=5)


def test_a_worker_that_another_client_uses(worker: Worker) -> None:
    hello = struct.pack("<BQ24x", 14, 24)
    with socket.create_connection(("127.0.0.1", worker.port)) as client:
        client.sendall(hello)
        assert len(client.recv(36, socket.MSG_WAITALL)) == 36
        with pytest.raises(Dots1Error, match="another client"):
            probe([worker.endpoint], timeout=0.2)
    probe([worker.endpoint])


def test_one_worker_by_two_names_is_refused(worker: Worker) -> None:
    names = [worker.endpoint, f"localhost:{worker.port}"]
    with pytest.raises(Dots1Error, match=rf"localhost:.* {worker.endpoint}"):
        probe(names, timeout=0.5)
    with local_worker() as other:
        probe([worker.endpoint, other.endpoint, f" {worker.endpoint} "])
