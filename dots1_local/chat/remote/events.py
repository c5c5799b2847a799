"""Server-sent events: from bytes in pieces, cut anywhere, to the data of each event."""

import codecs
import re
from collections.abc import Iterable, Iterator
from itertools import chain

from dots1_local.errors import Dots1Error

__all__ = ["events"]

_LONGEST = 1 << 22  # characters of an event; nothing a chat sends comes near
_LINE_END = re.compile(r"\r\n|\n|\r(?!$)")  # a return at the end may yet get its newline
_DATA = ("data", "error")  # llama.cpp's server once sent errors in a field of their own
_END = "[DONE]"


def events(pieces: Iterable[bytes]) -> Iterator[str]:
    """The data of each event, up to [DONE] or the end of the stream.

    Raises:
        Dots1Error: an event has no end.
    """
    data: list[str] = []
    size = 0
    for line in chain(_lines(pieces), [""]):
        name, _, value = line.partition(":")
        if name in _DATA:
            data.append(value.removeprefix(" "))
            size += 1 + len(value)
            _check(size)
        elif not line:
            text, data, size = "\n".join(data), [], 0
            if text == _END:
                return
            if text:
                yield text


def _lines(pieces: Iterable[bytes]) -> Iterator[str]:
    """Whole lines, without their ends; a line that is cut off is left out."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
    rest = ""
    for piece in pieces:
        *lines, rest = _LINE_END.split(rest + decoder.decode(piece))
        yield from lines
        _check(len(rest))
    if rest.endswith("\r"):
        yield rest[:-1]


def _check(size: int) -> None:
    if size > _LONGEST:
        raise Dots1Error("the server sends an event without end")
