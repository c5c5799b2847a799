"""Hostile HTTP against `dots1 serve`: each trial sends a group of requests to a shared server.

After each group the server must answer a known prompt as before, run no answer that nobody reads,
have logged no bug, and have grown by no more than 5% since it was warm. A row has a server of its
own.
"""

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from random import Random
from typing import Any

import hypothesis
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.campaign.served import LENGTH, PATHS, Server, check_error, server, text_of
from benchmarks.campaign.trial import Broken, Part

__all__ = ["PART"]

_GROUP = 50
_AT_ONCE = 64
_SECONDS = 60.0
_JSON = {"Content-Type": "application/json"}
_HEADS = (
    b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 3",
    b"Content-Length: 5\r\nContent-Length: 6", b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nContent-Length: 5", b"Transfer-Encoding: gzip",
    b"Expect: 100-continue", b"Upgrade: websocket\r\nConnection: upgrade", b"X: a\r\n b",
    b"X\x00: a", b": a", b"Content-Encoding: gzip", b"Content-Type: text/plain",
    b"Host: a\r\nHost: b", b"Connection: keep-alive, close", b"X: " + b"a" * 70_000,
)  # fmt: skip
_OPENINGS = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9,
    b"GET /v1/models\r\n\r\n", b"GET /v1/models HTTP/9.9\r\n\r\n", b"\r\n" * 99,
    b"GET http://a/v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    b"GET /" + b"a" * 90_000 + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    b"GET /%ff%00%0d%0a/../.. HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
)  # fmt: skip


def _burst(random: Random, folder: Path) -> int:
    """64 requests in flight, of all APIs; each answer must be its own."""
    served = server("burst")
    seeds = [random.getrandbits(64) for _ in range(2 * _AT_ONCE)]
    _in_parallel(lambda seed: _one(served, Random(seed)), seeds)
    served.check(len(seeds))
    return len(seeds)


def _one(served: Server, random: Random) -> None:
    kind, stream = random.choice(list(PATHS)), random.random() < 0.5
    body, expected = _request(served, random, kind, stream)
    with closing(HTTPConnection("127.0.0.1", served.port, timeout=_SECONDS)) as connection:
        connection.request("POST", PATHS[kind], json.dumps(body), _JSON)
        response = connection.getresponse()
        found = response.read()
    if response.status != 200:
        raise Broken(f"{kind} answered {response.status}: {found[:200]!r}")
    text = _streamed(kind, found) if stream else text_of(kind, json.loads(found))
    if text != expected:
        raise Broken(f"{kind} (stream {stream}) answered {text!r}, not {expected!r}")


def _request(served: Server, random: Random, kind: str, stream: bool) -> tuple[dict[str, Any], str]:
    """Return a body and what is answered: the words it names, or what the model says alone."""
    said, expected = random.choice(list(served.answers.items()))
    limit = {"responses": "max_output_tokens"}.get(kind, "max_tokens")
    body: dict[str, Any] = {"stream": stream, "temperature": 0, limit: LENGTH}
    if kind == "completions" or random.random() < 0.3:
        expected = f"{random.getrandbits(64):x}"
        body |= {limit: 64, "guided_choice": [expected]}
    if kind == "completions":
        return body | {"prompt": said}, expected
    if kind == "responses":
        return body | {"input": said}, expected
    return body | {"messages": [{"role": "user", "content": said}]}, expected


def _streamed(kind: str, found: bytes) -> str:
    """Return the text of a stream, which must have come to its end."""
    frames = found.decode().split("\n\n")
    lines = [line[6:] for each in frames for line in each.split("\n") if line[:6] == "data: "]
    if kind in ("chat", "completions") and lines.pop() != "[DONE]":
        raise Broken(f"a stream of {kind} ended without [DONE]")
    events = [json.loads(line) for line in lines]
    if kind == "chat":
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    if kind == "completions":
        return "".join(event["choices"][0]["text"] for event in events)
    if kind == "messages":
        if events[-1]["type"] != "message_stop":
            raise Broken("a stream of messages ended without message_stop")
        deltas = [each["delta"] for each in events if each["type"] == "content_block_delta"]
        return "".join(delta["text"] for delta in deltas)
    if events[-1]["type"] not in ("response.completed", "response.incomplete"):
        raise Broken("a stream of responses ended without its last event")
    return "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")


def _slow(random: Random, folder: Path) -> int:
    """Heads and bodies that arrive in small pieces, beside connections that say nothing."""
    served = server("slow")
    with _silent(served, random.randrange(1, 100), b"POST /v1/chat/comp"):
        seeds = [random.getrandbits(64) for _ in range(_GROUP)]
        _in_parallel(lambda seed: _one_slow(served, Random(seed)), seeds)
    served.check(_GROUP)
    return _GROUP


def _one_slow(served: Server, random: Random) -> None:
    kind = random.choice(list(PATHS))
    body, expected = _request(served, random, kind, stream=False)
    data, start = _written(PATHS[kind], body), 0
    with closing(_connect(served)) as client:
        while start < len(data):
            size = random.randrange(1, max(2, len(data) // 8))
            client.sendall(data[start : start + size])
            start += size
            time.sleep(random.random() * 0.05)
        status, found = _answer(client)
    if status != 200 or text_of(kind, json.loads(found)) != expected:
        raise Broken(f"a slow client of {kind} got {status}: {found[:200]!r}")


class _silent:
    """Connections that send the beginning of a head, and nothing more."""

    def __init__(self, served: Server, count: int, beginning: bytes) -> None:
        self._clients = [_connect(served) for _ in range(count)]
        for client in self._clients:
            client.sendall(beginning)

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None:
        for client in self._clients:
            client.close()


def _half(random: Random, folder: Path) -> int:
    """Requests that are cut off anywhere, by a FIN, a RST, or an end of sending alone."""
    served = server("half")
    seeds = [random.getrandbits(64) for _ in range(_GROUP)]
    _in_parallel(lambda seed: _one_half(served, Random(seed)), seeds)
    served.check(_GROUP)
    return _GROUP


def _one_half(served: Server, random: Random) -> None:
    kind = random.choice(list(PATHS))
    body, _ = _request(served, random, kind, random.random() < 0.5)
    data = _written(PATHS[kind], body)
    with closing(_connect(served)) as client, suppress(ConnectionError):
        client.sendall(data[: random.randrange(len(data))])
        how = random.randrange(3)
        if how == 0:
            _reset(client)
        elif how == 1:
            client.shutdown(socket.SHUT_WR)
            found = _all(client)
            if found.startswith(b"HTTP/1.1 2"):
                raise Broken(f"half a request was answered: {found[:200]!r}")


def _disconnects(random: Random, folder: Path) -> int:
    """Clients that leave while their answer is computed or sent."""
    served = server("disconnects")
    seeds = [random.getrandbits(64) for _ in range(_GROUP)]
    _in_parallel(lambda seed: _one_disconnect(served, Random(seed)), seeds)
    served.check(_GROUP)
    return _GROUP


def _one_disconnect(served: Server, random: Random) -> None:
    kind = random.choice(list(PATHS))
    body, _ = _request(served, random, kind, stream=random.random() < 0.8)
    with closing(_connect(served)) as client, suppress(ConnectionError):
        client.sendall(_written(PATHS[kind], body))
        if random.random() < 0.7:
            client.recv(random.randrange(1, 2000))
        else:
            time.sleep(random.random() * 0.1)
        if random.random() < 0.5:
            _reset(client)


def _garbage(random: Random, folder: Path) -> int:
    """Mutated requests; what is answered must be HTTP, and an error in its API's shape."""
    served = server("garbage")
    seeds = [random.getrandbits(64) for _ in range(_GROUP)]
    _in_parallel(lambda seed: _one_garbage(served, Random(seed)), seeds, at_once=16)
    served.check(_GROUP)
    return _GROUP


def _one_garbage(served: Server, random: Random) -> None:
    data = _mutated(served, random)
    with closing(_connect(served)) as client, suppress(ConnectionError):
        client.settimeout(0.5)
        first = b""
        with suppress(TimeoutError, ConnectionError):
            client.sendall(data)
            first = client.recv(1 << 16)
        client.settimeout(_SECONDS)
        with suppress(OSError):
            client.shutdown(socket.SHUT_WR)
        _check_answer(data, first + _all(client))


def _mutated(served: Server, random: Random) -> bytes:
    if random.random() < 0.1:
        return random.choice(_OPENINGS)
    kind = random.choice(list(PATHS))
    body, _ = _request(served, random, kind, random.random() < 0.5)
    head, _, content = _written(PATHS[kind], body).partition(b"\r\n\r\n")
    how = random.randrange(6)
    if how == 0:
        head += b"\r\n" + random.choice(_HEADS)
    elif how == 1:
        head = _damaged(head, random)
    elif how == 2:
        content = _damaged(content, random)
    elif how == 3:
        head += b"".join(b"\r\nX-%d: a" % n for n in range(random.choice([50, 500, 9000])))
    elif how == 4:
        head = _without_length(head) + b"\r\nTransfer-Encoding: chunked"
        content = _damaged(b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content), random)
    elif random.random() < 0.1:
        content = b" " * (9 << 20)
        head = _without_length(head) + b"\r\nContent-Length: %d" % len(content)
    else:
        content = bytes(random.choices(b'{}[]",:0e-\\u\x00\xff ', k=len(content)))
    return head + b"\r\n\r\n" + content


def _damaged(data: bytes, random: Random) -> bytes:
    """Flip, delete, repeat or insert bytes."""
    changed = bytearray(data)
    for _ in range(random.randrange(1, 5)):
        at = random.randrange(len(changed) or 1)
        end = at + random.randrange(1, 9)
        replacement = random.choice(
            [random.randbytes(end - at), b"", bytes(changed[at:end] * 2), b"\r\n", b"\x00"]
        )
        changed[at:end] = replacement
    return bytes(changed)


def _without_length(head: bytes) -> bytes:
    return b"\r\n".join(line for line in head.split(b"\r\n") if b"Content-Length" not in line)


def _check_answer(sent: bytes, found: bytes) -> None:
    """Check what came back, if anything did, as the answer to the path that was sent."""
    if found.startswith(b"HTTP/1.1 100 "):
        found = found.partition(b"\r\n\r\n")[2]
    if not found:
        return
    head, _, body = found.partition(b"\r\n\r\n")
    words = head.split()
    if words[0] != b"HTTP/1.1" or not words[1].isdigit():
        raise Broken(f"{sent[:80]!r} was answered with {found[:80]!r}")
    status = int(words[1])
    if status >= 400 and not sent.startswith(b"HEAD"):
        target = (sent.split() or [b""])[1:2]
        path = target[0].decode("latin-1") if target else ""
        shape = "/v1/messages" if b'"type":"error"' in body else "/"
        if shape != "/" and "message" not in path:
            raise Broken(f"{sent[:80]!r} was answered in another API's shape: {body[:200]!r}")
        check_error(shape, status, body[: _length(head)])


def _length(head: bytes) -> int | None:
    """Return the Content-Length, after which further answers may follow."""
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return None


def _schema(random: Random, folder: Path) -> int:
    """Bodies that schemathesis makes of /openapi.json, half of which do not match it."""
    served = server("schema")
    description = schemathesis.openapi.from_url(f"http://127.0.0.1:{served.port}/openapi.json")
    path = random.choice([*PATHS.values(), "/v1/messages/count_tokens", "/tokenize", "/detokenize"])
    mode = random.choice([GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    checks = [
        not_a_server_error, status_code_conformance, content_type_conformance,
        response_schema_conformance,
    ]  # fmt: skip
    tried = 0

    @hypothesis.seed(random.getrandbits(64))
    @hypothesis.settings(
        max_examples=_GROUP,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=description[path]["POST"].as_strategy(generation_mode=mode))
    def exchange(case: Any) -> None:
        nonlocal tried
        tried += 1
        if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
            _shorten(case.body)
        response = case.call(timeout=_SECONDS)
        if response.status_code >= 400:
            check_error(path, response.status_code, response.content)
        case.validate_response(response, checks=checks)

    exchange()
    served.check(tried)
    return tried


def _shorten(body: dict[str, Any]) -> None:
    """Keep the answers short, so that trying is not waiting."""
    for name in ("n", "n_cmpl", "best_of", "ignore_eos"):
        body.pop(name, None)
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"):
        if name in body and body[name] != 0:
            body[name] = 4


def _in_parallel(call: Callable[[int], None], seeds: list[int], at_once: int = _AT_ONCE) -> None:
    """Call with each seed, so many at a time; raise the first failure after all have ended."""
    with ThreadPoolExecutor(at_once) as pool:
        results = [pool.submit(call, seed) for seed in seeds]
    for seed, result in zip(seeds, results, strict=True):
        if error := result.exception():
            raise Broken(f"request {seed}: {type(error).__name__}: {error}") from error


def _connect(served: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), timeout=_SECONDS)


def _written(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def _answer(client: socket.socket) -> tuple[int, bytes]:
    response = HTTPResponse(client)
    try:
        response.begin()
        return response.status, response.read()
    except HTTPException as error:
        raise Broken(f"an answer is not HTTP: {error!r}") from None


def _all(client: socket.socket) -> bytes:
    """Return what comes until the end, or until the connection is reset."""

    def parts() -> Iterator[bytes]:
        with suppress(ConnectionError):
            while part := client.recv(1 << 16):
                yield part

    return b"".join(parts())


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


PART = Part(
    "none lost or mixed, memory flat within 5%, every error in its API's shape",
    {
        "schema": (_schema, 40),
        "slow": (_slow, 30),
        "half": (_half, 40),
        "burst": (_burst, 20),
        "disconnects": (_disconnects, 30),
        "garbage": (_garbage, 40),
    },
)
