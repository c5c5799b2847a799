"""The responses of POST /v1/chat/completions."""

import secrets
from collections.abc import Sequence

from dots1_local.runtime.chat.message import ToolCall
from dots1_local.serve.generation import Finished, Piece, TokenLogprob
from dots1_local.serve.http.options import Options
from dots1_local.serve.http.writer import Collected, Document, Writer, logprob, token_name
from dots1_local.serve.tool_calls import ToolCallText

__all__ = ["ChatWriter"]


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
