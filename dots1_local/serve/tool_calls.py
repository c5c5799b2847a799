"""Calls of tools in an answer, as models of the Hermes and Qwen families write them.

<tool_call>
{"name": "weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

import json
from typing import Any

from dots1_local.runtime.chat.message import ToolCall

__all__ = ["ToolCallText"]

_START, _END = "<tool_call>", "</tool_call>"


class ToolCallText:
    """Text in pieces in, content and whole calls out; what may become a call is held back.

    Space before a call is no content. What is between the tags and no call stays text.
    """

    def __init__(self) -> None:
        self._held = ""
        self._inside = False

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """The content and the calls that are certain with this piece."""
        self._held += text
        if self._inside and ">" not in text:
            return "", []
        given: list[str] = []
        calls: list[ToolCall] = []
        while self._step(given, calls):
            pass
        return "".join(given), calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What was held back, now that no more comes; a call need not be closed."""
        held, self._held = self._held, ""
        call = _call(held.partition(_START)[2]) if self._inside else None
        return ("", [call]) if call else (held, [])

    def _step(self, given: list[str], calls: list[ToolCall]) -> bool:
        """Give what is certain; whether there may be more."""
        if self._inside:
            whole, end, rest = self._held.partition(_END)
            if not end:
                return False
            call = _call(whole.partition(_START)[2])
            if call:
                calls.append(call)
            else:
                given.append(whole + end)
            self._held, self._inside = rest, False
            return True
        content, start, rest = self._held.partition(_START)
        self._inside = bool(start)
        if not start:
            size = _beginning(content)
            content, rest = content[: len(content) - size], content[len(content) - size :]
        given.append(content.rstrip())
        self._held = content[len(given[-1]) :] + start + rest
        return self._inside


def _beginning(text: str) -> int:
    """How many characters at the end may be those of a tag that is not whole yet."""
    return next((n for n in range(len(_START) - 1, 0, -1) if text.endswith(_START[:n])), 0)


def _call(text: str) -> ToolCall | None:
    """The call that a JSON object says; None if it says none."""
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
