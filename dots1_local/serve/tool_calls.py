"""The tool calls in what a model writes, as far as they have come.

`chat.tools` says how calls are written, and keeps answers to that.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dots1_local.chat.message import ToolCall
from dots1_local.chat.tools import CALL_END, CALL_START

__all__ = ["CallPart", "Part", "ToolCallParser", "joined"]

_MAX_HEAD = 1 << 12  # characters of a call before its arguments
_STRING = r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"'
_HEAD = re.compile(rf'{CALL_START}\s*{{\s*"name"\s*:\s*({_STRING})\s*,\s*"arguments"\s*:\s*(?={{)')


@dataclass(frozen=True)
class CallPart:
    """A part of the call `number` of an answer: the first has its name, all have arguments."""

    number: int
    name: str | None
    arguments: str


Part = str | CallPart  # of an answer; a string is content


class ToolCallParser:
    """Splits an answer's text, which comes in pieces, into content and calls.

    Text that may begin a call is held back, and arguments are passed on as they come. White space
    before a call and after the last one is dropped. A tag that no call follows stays content.
    Without `tools` all text is content.
    """

    def __init__(self, tools: bool = True) -> None:
        self._tools = tools
        self._held = ""
        self._arguments: _ObjectReader | None = None
        self._closing = False  # after the arguments
        self.n_calls = 0

    def add(self, text: str) -> list[Part]:
        """Return the parts that are certain with this text."""
        self._held += text
        if not self._tools:
            return self.finish()
        return [part for part in self._certain() if part]

    def finish(self) -> list[Part]:
        """Return what was held back, because no text follows."""
        held, self._held = self._held, ""
        dropped = self._closing or (self.n_calls and held.isspace())
        return [held] if held and not dropped else []

    def _certain(self) -> Iterator[Part]:
        while self._held:
            if self._arguments:
                yield CallPart(self.n_calls - 1, None, self._take(self._arguments.read(self._held)))
                self._closing = self._arguments.ended
                self._arguments = None if self._closing else self._arguments
            elif self._closing:
                _, end, rest = self._held.partition(CALL_END)
                if not end:
                    return
                self._held, self._closing = rest, False
            elif self._held.lstrip().startswith(CALL_START):
                begun = self._held.lstrip()
                if head := _HEAD.match(begun):
                    self._held, self._arguments = begun[head.end() :], _ObjectReader()
                    yield CallPart(self.n_calls, json.loads(head[1]), "")
                    self.n_calls += 1
                elif CALL_END in begun or len(begun) > _MAX_HEAD:
                    yield self._take(self._held.index(CALL_START) + len(CALL_START))
                else:
                    return
            else:
                content, start, _ = self._held.partition(CALL_START)
                if not start:
                    content = content[: len(content) - _partial_tag(content)]
                content = content.rstrip()
                yield self._take(len(content))
                if not start:
                    return

    def _take(self, count: int) -> str:
        """Take so many characters out of the held text."""
        taken, self._held = self._held[:count], self._held[count:]
        return taken


class _ObjectReader:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False
        self.ended = False

    def read(self, text: str) -> int:
        """Return how many characters belong to the object."""
        for place, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            else:
                self._depth += (character in "{[") - (character in "}]")
                if not self._depth:
                    self.ended = True
                    return place + 1
        return len(text)


def joined(parts: Iterable[Part]) -> tuple[str, list[ToolCall]]:
    """Return the content and the calls of an answer's parts."""
    content, calls = "", list[ToolCall]()
    for part in parts:
        if isinstance(part, str):
            content += part
        elif part.name is not None:
            calls.append(ToolCall(part.name, part.arguments))
        else:
            last = calls.pop()
            calls.append(ToolCall(last.name, last.arguments + part.arguments))
    return content, calls


def _partial_tag(text: str) -> int:
    """Return how many characters at the end may be the beginning of a tag."""
    lengths = range(len(CALL_START) - 1, 0, -1)
    return next((n for n in lengths if text.endswith(CALL_START[:n])), 0)
