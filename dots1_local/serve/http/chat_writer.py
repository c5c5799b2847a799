"""Tool calls in an answer, as models of the Hermes and Qwen families write them.

<tool_call>
{"name": "weather", "arguments": {"city": "Paris"}}
</tool_call>

The responses of POST /v1/chat/completions.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from dots1_local.chat.message import ToolCall
from dots1_local.serve.generation import Finished, Piece, TokenLogprob
from dots1_local.serve.http.answering import Collected, Document, Writer, logprob, token_name
from dots1_local.serve.http.request import Options

__all__ = [
    "ChatWriter",
    "ToolCallText",
]


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


class ChatWriter(Writer):
    """One message for each choice; with `tools`, calls of them are taken out of its text."""

    prefix = "chatcmpl"
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, options: Options, choices: int, *, tools: bool) -> None:
        super().__init__(model, options, choices)
        self._messages = [_Message(tools) for _ in range(choices)]

    def begin(self) -> list[Document]:
        """Who speaks, in every choice."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta=delta, logprobs=None) for index in range(self.choices)]

    def piece(self, piece: Piece) -> list[Document]:
        text, calls = self._messages[piece.index].add(piece.text)
        return self._deltas(piece.index, text, calls, piece.logprobs)

    def finish(self, finished: Finished) -> list[Document]:
        message = self._messages[finished.index]
        deltas = self._deltas(finished.index, *message.finish())
        reason = message.reason(finished)
        return [*deltas, self._chunk(finished.index, reason, delta={}, logprobs=None)]

    def _deltas(
        self,
        index: int,
        text: str,
        calls: Sequence[Document],
        logprobs: Sequence[TokenLogprob] = (),
    ) -> list[Document]:
        deltas: list[Document] = [{"content": text}] if text or logprobs else []
        deltas += [{"tool_calls": [call]} for call in calls]
        return [
            self._chunk(index, delta=delta, logprobs=None if at else self._logprobs(logprobs))
            for at, delta in enumerate(deltas)
        ]

    def _choice(self, index: int, answer: Collected) -> Document:
        message = self._messages[index]
        text, calls = message.add(answer.text)
        rest, more = message.finish()
        said: Document = {"role": "assistant", "content": text + rest, "refusal": None}
        if calls or more:
            said |= {"content": text + rest or None, "tool_calls": calls + more}
        return {
            "index": index,
            "message": said,
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": answer.finished and message.reason(answer.finished),
        }

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> Document | None:
        if self.options.top_logprobs is None:
            return None
        content = [
            {
                **_entry(token.piece, token.logprob),
                "top_logprobs": [_entry(piece, value) for _, piece, value in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


class _Message:
    """One choice's text, split into content and tool calls if there are tools."""

    def __init__(self, tools: bool) -> None:
        self._reader = ToolCallText() if tools else None
        self._calls = 0

    def add(self, text: str) -> tuple[str, list[Document]]:
        """The content and the calls that are certain with this piece."""
        if self._reader is None:
            return text, []
        content, calls = self._reader.add(text)
        return content, [self._call(call) for call in calls]

    def finish(self) -> tuple[str, list[Document]]:
        """What was held back, now that no more comes."""
        if self._reader is None:
            return "", []
        content, calls = self._reader.finish()
        return content, [self._call(call) for call in calls]

    def reason(self, finished: Finished) -> str:
        """Why it ended."""
        return "tool_calls" if self._calls and finished.reason == "stop" else finished.reason

    def _call(self, call: ToolCall) -> Document:
        self._calls += 1
        return {
            "index": self._calls - 1,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }


def _entry(piece: bytes, value: float) -> Document:
    return {"token": token_name(piece), "logprob": logprob(value), "bytes": list(piece)}
