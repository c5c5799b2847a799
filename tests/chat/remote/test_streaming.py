"""Server-sent events by the rules of the HTML standard, and waiting that can be stopped."""

import socket
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from threading import Event
from time import monotonic

import httpx2
import pytest

from dots1_local.chat.remote.streaming import StreamingRequest
from dots1_local.errors import Dots1Error
from tests.openai_server import Played, playing

STREAM = (
    ": ping\n\ndata: one\n\n"
    "data:two 中文\r\n\r\n"
    "event: x\nid: 7\ndata: th\ndata: ree 🐈\n\n"
    "data\n\n\n"
    ": ping\r\n\r\n"
    "data: [DONE]\n\ndata: not any more\n\n"
).encode()
FOUND = ["one", "two 中文", "th\nree 🐈"]


def received(pieces: Iterable[bytes]) -> list[str]:
    """The events in an answer that arrives in these pieces."""
    with playing(Played(pieces)) as server:  # type: ignore[arg-type]
        request = httpx2.Request("POST", server.url, json={})
        with StreamingRequest(request, lambda: None, server=server.url) as streaming:
            assert streaming.head().status_code == 200
            return [part.decode() for part in streaming.parts()]


@pytest.mark.parametrize("size", [1, 2, 3, 7, len(STREAM)])
def test_events_are_found_wherever_the_stream_is_cut(size: int) -> None:
    assert received([STREAM[at : at + size] for at in range(0, len(STREAM), size)]) == FOUND


@pytest.mark.parametrize(
    ("stream", "found"),
    [
        (b"data: one\r\rdata: two\r\r", ["one", "two"]),
        (b"\xef\xbb\xbfdata: one\n\n", ["one"]),  # a byte order mark
        (b'data: {"a": "\xe2\x80\xa8"}\n\n', ['{"a": "\u2028"}']),  # not a line end
        (b"data: one\n\ndata: tw", ["one"]),  # it is cut
        (b"data: caf\xc3\x28\n\n", ["caf\ufffd("]),
        (b"", []),
    ],
)
def test_streams_end_and_break_off_in_many_ways(stream: bytes, found: list[str]) -> None:
    assert received([stream]) == found


@pytest.mark.parametrize(
    "piece", [b"x" * 65536, b"data: " + b"x" * 65536 + b"\n", b"data:\n" * 65536]
)
def test_an_endless_event_is_refused(piece: bytes) -> None:
    with pytest.raises(Dots1Error, match="without end"):
        received(repeat(piece))


class Stopped(Exception):
    """The caller stops waiting."""


def never_resolved(*_: object, **__: object) -> Sequence[object]:
    Event().wait(5)
    raise socket.gaierror


def never_connected(*_: object, **__: object) -> socket.socket:
    Event().wait(5)
    raise TimeoutError


@pytest.mark.parametrize(
    ("function", "slow"),
    [("getaddrinfo", never_resolved), ("create_connection", never_connected)],
)
def test_looking_up_a_name_and_connecting_can_be_stopped(
    monkeypatch: pytest.MonkeyPatch, function: str, slow: Callable[..., object]
) -> None:
    monkeypatch.setattr(socket, function, slow)
    begun = monotonic()

    def wake() -> None:
        if monotonic() - begun > 0.2:
            raise Stopped

    request = httpx2.Request("GET", "http://example.invalid/v1/models")
    with (
        pytest.raises(Stopped),
        StreamingRequest(request, wake, server="http://example.invalid/v1") as streaming,
    ):
        streaming.head()
    assert monotonic() - begun < 1
