"""Base URLs as people write them, sent over sockets as clients send them."""

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from threading import Thread
from typing import Any

import pytest
import uvicorn

from dots1_local.engine.engine import Engine
from dots1_local.serve.http.app import Connection
from dots1_local.serve.run import bind
from tests.serve.http.asgi import FakeScheduler, serving

BODIES = {
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "/tokenize": {"prompt": "hi"},
}
KEY = "secret"


@pytest.fixture(scope="module")
def port(engine: Engine) -> Iterator[int]:
    """A server that wants a key."""
    app = serving(engine, FakeScheduler(), api_key=KEY)
    config = uvicorn.Config(app, http=Connection, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    with closing(bind("127.0.0.1", 0)) as listener:
        thread = Thread(target=server.run, args=([listener],))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(60)


def exchanged(port: int, request: bytes) -> tuple[int, bytes]:
    """Return the status and the body of the answer to these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(request)
        answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    begin, _, rest = answer.partition(b"\r\n\r\n")
    return int(begin.split()[1]), rest


def asked(port: int, target: str, body: Any = None, key: str = KEY) -> tuple[int, bytes]:
    """Send a request whose target is written so."""
    data = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{'GET' if body is None else 'POST'} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return exchanged(port, head.encode() + data)


@pytest.mark.parametrize(
    "written",
    [
        "{}",
        "/{}",
        "{}/",
        "{}//",
        "/v1{}",
        "/v1/{}",
        "http://localhost:8000{}",
        "HTTP://[::1]:8000/{}?a=b",
        "https://user@proxy.example{}/",
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/messages/count_tokens", "/tokenize"])
@pytest.mark.parametrize("version", [True, False])
def test_an_endpoint_is_found_however_the_base_url_is_written(
    port: int, path: str, written: str, version: bool
) -> None:
    target = written.format(path if version else path.removeprefix("/v1"))
    status, answer = asked(port, target, BODIES.get(path))
    assert (status, answer) == asked(port, path, BODIES.get(path))
    assert status == 200


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("//v1//models//dots1/", 200),
        ("/models/dots1", 200),
        ("/models/other", 404),
        ("/v1", 404),
        ("/v1/v1/", 404),
        ("/v1/embeddings/", 404),
        ("/v2/models", 404),
        ("/x/v1/models", 404),
        ("/v1/page/chat.js", 404),
        ("http:/v1/models", 404),
        ("*", 404),
        ("/", 200),
        ("http://localhost", 200),
        ("/v1//health/", 200),
        ("/page//../health", 404),
    ],
)
def test_other_paths_mean_what_they_say(port: int, target: str, status: int) -> None:
    assert asked(port, target)[0] == status


@pytest.mark.parametrize("target", ["//v1//models", "/models", "http://page/v1/models", "/props/"])
def test_no_way_of_writing_a_path_gets_around_the_key(port: int, target: str) -> None:
    assert asked(port, target, key="wrong")[0] == 401


@pytest.mark.parametrize("target", ["/messages", "//v1/messages/", "/v1/v1/messages"])
def test_errors_have_the_shape_of_the_api_that_is_meant(port: int, target: str) -> None:
    status, answer = asked(port, target, {"messages": 1})
    assert (status, json.loads(answer)["type"]) == (400, "error")


@pytest.mark.parametrize(
    ("request_", "anthropic"),
    [
        (b"\x16\x03\x01 hello\r\n\r\n", False),
        (b"GET /v1/models HTTP/1.1\r\n\r\n", False),  # without a host
        (b"POST /messages HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n", False),
        (
            f"POST /v1/messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nz".encode(),
            True,
        ),
    ],
)
def test_what_is_not_http_gets_an_error_in_the_shape_of_its_api(
    port: int, request_: bytes, anthropic: bool
) -> None:
    status, answer = exchanged(port, request_ + b"\r\n")
    error = json.loads(answer)
    assert (status, error["error"]["type"]) == (400, "invalid_request_error")
    assert ("type" in error) == anthropic
