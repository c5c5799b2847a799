"""The responses of POST /v1/chat/completions, and the tool calls in what the model writes.

Models of the Hermes and Qwen families write a call as

<tool_call>
{"name": "weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

import json
import secrets
from collections.abc import Iterator, Sequence

from dots1_local.chat.message import ToolCall
from dots1_local.files.json_file import JsonError, parse_json
from dots1_local.serve.generation import Finished, Piece, TokenLogprob
from dots1_local.serve.http.request import Options
from dots1_local.serve.http.response import Document, Writer, named_logprob

__all__ = ["ChatWriter", "ToolCallParser"]

_START, _END = "<tool_call>", "</tool_call>"


class ChatWriter(Writer):
    """Writes one message for each choice; with `tools`, tool calls are taken out of its text."""

    prefix = "chatcmpl"
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, options: Options, n_choices: int, *, tools: bool) -> None:
        super().__init__(model, options, n_choices)
        self._parsers = [ToolCallParser(tools) for _ in range(n_choices)]
        self._n_calls = [0] * n_choices  # so far

    def begin(self) -> list[Document]:
        """Return a chunk with the role for each choice."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta=delta, logprobs=None) for index in range(self.n_choices)]

    def piece(self, piece: Piece) -> list[Document]:
        text, calls = self._parsers[piece.index].add(piece.text)
        return self._deltas(piece.index, text, calls, piece.logprobs)

    def finish(self, finished: Finished) -> list[Document]:
        deltas = self._deltas(finished.index, *self._parsers[finished.index].finish())
        reason = self._finish_reason(finished)
        return [*deltas, self._chunk(finished.index, reason, delta={}, logprobs=None)]

    def _deltas(
        self,
        index: int,
        text: str,
        calls: Sequence[ToolCall],
        logprobs: Sequence[TokenLogprob] = (),
    ) -> list[Document]:
        deltas: list[Document] = [{"content": text}] if text or logprobs else []
        deltas += [{"tool_calls": [call]} for call in self._numbered(index, calls)]
        return [
            self._chunk(index, delta=delta, logprobs=None if at else self._logprobs(logprobs))
            for at, delta in enumerate(deltas)
        ]

    def _choice(self, piece: Piece, finished: Finished) -> Document:
        parser = self._parsers[piece.index]
        (text, calls), (rest, more) = parser.add(piece.text), parser.finish()
        message: Document = {"role": "assistant", "content": text + rest, "refusal": None}
        if documents := self._numbered(piece.index, calls + more):
            message |= {"content": text + rest or None, "tool_calls": documents}
        return {
            "index": piece.index,
            "message": message,
            "logprobs": self._logprobs(piece.logprobs),
            "finish_reason": self._finish_reason(finished),
        }

    def _numbered(self, index: int, calls: Sequence[ToolCall]) -> list[Document]:
        """Return the calls of a choice as JSON, numbered after those that it has made already."""
        first = self._n_calls[index]
        self._n_calls[index] += len(calls)
        return [
            {
                "index": number,
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for number, call in enumerate(calls, first)
        ]

    def _finish_reason(self, finished: Finished) -> str:
        calls = self._n_calls[finished.index]
        return "tool_calls" if calls and finished.reason == "stop" else finished.reason

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> Document | None:
        if self.options.choice.top_logprobs is None:
            return None
        content = [
            {
                **_logprob_entry(token.piece, token.logprob),
                "top_logprobs": [_logprob_entry(piece, value) for _, piece, value in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _logprob_entry(piece: bytes, value: float) -> Document:
    name, value = named_logprob(piece, value)
    return {"token": name, "logprob": value, "bytes": list(piece)}


class ToolCallParser:
    """Splits an answer's text, which comes in pieces, into content and whole tool calls.

    Text that may become a call is held back. White space before a call is dropped. Tags around
    anything but a call stay content. Without `tools` all text is content.
    """

    def __init__(self, tools: bool = True) -> None:
        self._tools = tools
        self._held = ""
        self._inside = False

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """Return the content and the calls that are certain with this text."""
        if not self._tools:
            return text, []
        self._held += text
        if self._inside and ">" not in text:
            return "", []
        found = list(self._certain())
        content = "".join(each for each in found if isinstance(each, str))
        return content, [each for each in found if isinstance(each, ToolCall)]

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Return what was held back, because no text follows; the last call may lack its end."""
        held, self._held = self._held, ""
        call = _parse_call(held.partition(_START)[2]) if self._inside else None
        return ("", [call]) if call else (held, [])

    def _certain(self) -> Iterator[str | ToolCall]:
        """Take content and calls in turn from the held text."""
        while True:
            content, start, _ = self._held.partition(_START)
            if not start:
                content = content[: len(content) - _partial_tag(content)]
            content = content.rstrip()
            yield content
            self._held, self._inside = self._held[len(content) :], bool(start)
            whole, end, rest = self._held.partition(_END)
            if not (start and end):
                return
            yield _parse_call(whole.partition(_START)[2]) or whole + end
            self._held, self._inside = rest, False


def _partial_tag(text: str) -> int:
    """Return how many characters at the end may be the beginning of a tag."""
    return next((n for n in range(len(_START) - 1, 0, -1) if text.endswith(_START[:n])), 0)


def _parse_call(text: str) -> ToolCall | None:
    """Parse a call; return None if the text is not a JSON object that describes one."""
    try:
        call = parse_json(text.encode())
        name, arguments = call["name"], call.get("arguments", {})
        written = json.dumps(arguments, ensure_ascii=False)
    except (JsonError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(name, written)
