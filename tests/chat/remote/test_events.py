"""Server-sent events, by the rules of the HTML standard that servers use of them."""

from itertools import pairwise, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dots1_local.chat.remote.events import events
from dots1_local.errors import Dots1Error

STREAM = (
    ": ping\n\ndata: one\n\n"
    "data:two 中文\r\n\r\n"
    "event: x\nid: 7\ndata: th\ndata: ree 🐈\n\n"
    "data\n\n\n"
    ": ping\r\n\r\n"
    "error: four\n\n"
    "data: [DONE]\n\ndata: not any more\n\n"
).encode()
FOUND = ["one", "two 中文", "th\nree 🐈", "four"]


@given(st.lists(st.integers(0, len(STREAM))))
def test_events_are_found_wherever_the_stream_is_cut(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    assert list(events(STREAM[a:b] for a, b in pairwise(places))) == FOUND


@pytest.mark.parametrize(
    ("stream", "found"),
    [
        (b"data: one\r\rdata: two\r\r", ["one", "two"]),
        (b"\xef\xbb\xbfdata: one\n\n", ["one"]),  # a byte order mark
        (b'data: {"a": "\xe2\x80\xa8"}\n\n', ['{"a": "\u2028"}']),  # no line end here
        (b"data: one\n\ndata: two\n", ["one", "two"]),  # the stream ends without a blank line
        (b"data: one\n\ndata: tw", ["one"]),  # it is cut
        (b"data: caf\xc3\x28\n\n", ["caf\ufffd("]),
        (b"", []),
    ],
)
def test_streams_end_and_break_off_in_many_ways(stream: bytes, found: list[str]) -> None:
    assert list(events([stream])) == found


@pytest.mark.parametrize(
    "piece", [b"x" * 65536, b"data: " + b"x" * 65536 + b"\n", b"data:\n" * 65536]
)
def test_an_event_without_end_is_not_waited_for(piece: bytes) -> None:
    with pytest.raises(Dots1Error, match="an event without end"):
        list(events(repeat(piece)))
