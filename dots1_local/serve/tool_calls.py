"""Tool calls in an answer, as models of the Hermes and Qwen families write them.

<tool_call>
{"name": "weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

import json
from collections.abc import Iterator
from typing import Any

from dots1_local.runtime.chat.message import ToolCall

__all__ = ["ToolCallText"]

_START, _END = "<tool_call>", "</tool_call>"


class ToolCallText:
    """Takes an answer's text in pieces, and gives content and whole calls.

    What may become a call is held back. White space before a call is left out of the content. Tags
    around anything but a call are content.
    """

    def __init__(self) -> None:
        self._held = ""
        self._inside = False

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """The content and the calls that are certain with this piece."""
        self._held += text
        if self._inside and ">" not in text:
            return "", []
        found = list(self._certain())
        content = "".join(each for each in found if isinstance(each, str))
        return content, [each for each in found if isinstance(each, ToolCall)]

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What was held back, now that no more comes; a call need not be closed."""
        held, self._held = self._held, ""
        call = _call(held.partition(_START)[2]) if self._inside else None
        return ("", [call]) if call else (held, [])

    def _certain(self) -> Iterator[str | ToolCall]:
        """Content and calls in turn, taken from what is held."""
        while True:
            content, start, _ = self._held.partition(_START)
            if not start:
                content = content[: len(content) - _beginning(content)]
            content = content.rstrip()
            yield content
            self._held, self._inside = self._held[len(content) :], bool(start)
            whole, end, rest = self._held.partition(_END)
            if not (start and end):
                return
            yield _call(whole.partition(_START)[2]) or whole + end
            self._held, self._inside = rest, False


def _beginning(text: str) -> int:
    """How many characters at the end may be the beginning of a tag."""
    return next((n for n in range(len(_START) - 1, 0, -1) if text.endswith(_START[:n])), 0)


def _call(text: str) -> ToolCall | None:
    """The call that a JSON object describes; None if it is no such object."""
    try:
        said = json.loads(text, parse_constant=_refuse)
        name, arguments = said["name"], said.get("arguments", {})
        written = json.dumps(arguments, ensure_ascii=False)
        written.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(name, written)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
