"""The responses of POST /v1/chat/completions."""

import secrets
from collections.abc import Sequence
from typing import ClassVar

from dots1_local.serve.generation import Finished, Piece, TokenLogprob
from dots1_local.serve.http.response import Document, OpenAIWriter, named_logprob
from dots1_local.serve.http.shared_fields import Options
from dots1_local.serve.tool_calls import CallPart, Part, ToolCallParser, joined

__all__ = ["ChatWriter"]


class ChatWriter(OpenAIWriter):
    """Writes one message for each choice; with `tools`, tool calls are taken out of its text."""

    prefix = "chatcmpl"
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    no_text: ClassVar[Document] = {"delta": {}, "logprobs": None}

    def __init__(self, model: str, options: Options, n_choices: int, *, tools: bool) -> None:
        super().__init__(model, options, n_choices)
        self._parsers = [ToolCallParser(tools) for _ in range(n_choices)]

    def begin(self) -> list[Document]:
        """Return a chunk with the role for each choice."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta=delta, logprobs=None) for index in range(self.n_choices)]

    def piece(self, piece: Piece) -> list[Document]:
        parts = self._parsers[piece.index].add(piece.text)
        return self._deltas(piece.index, parts, piece.logprobs)

    def finish(self, finished: Finished) -> list[Document]:
        deltas = self._deltas(finished.index, self._parsers[finished.index].finish())
        reason = self._finish_reason(finished)
        return [*deltas, self._last_chunk(finished, reason)]

    def _deltas(
        self, index: int, parts: Sequence[Part], logprobs: Sequence[TokenLogprob] = ()
    ) -> list[Document]:
        deltas = [
            {"content": part} if isinstance(part, str) else {"tool_calls": [_call_delta(part)]}
            for part in parts
        ]
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        return [
            self._chunk(index, delta=delta, logprobs=None if at else self._logprobs(logprobs))
            for at, delta in enumerate(deltas)
        ]

    def _choice(self, piece: Piece, finished: Finished) -> Document:
        parser = self._parsers[piece.index]
        content, calls = joined([*parser.add(piece.text), *parser.finish()])
        message: Document = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            documents = [
                _call_delta(CallPart(number, call.name, call.arguments))
                for number, call in enumerate(calls)
            ]
            message |= {"content": content or None, "tool_calls": documents}
        return {
            "index": piece.index,
            "message": message,
            "logprobs": self._logprobs(piece.logprobs),
            "finish_reason": self._finish_reason(finished),
        }

    def _finish_reason(self, finished: Finished) -> str:
        calls = self._parsers[finished.index].n_calls
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


def _call_delta(part: CallPart) -> Document:
    """Return a part of a call as JSON; the first has the name, and a new id."""
    if part.name is None:
        return {"index": part.number, "function": {"arguments": part.arguments}}
    return {
        "index": part.number,
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": part.name, "arguments": part.arguments},
    }
