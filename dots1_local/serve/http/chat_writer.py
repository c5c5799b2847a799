"""The responses of POST /v1/chat/completions."""

from collections.abc import Sequence

from dots1_local.serve.generation import Finished, Piece, TokenLogprob
from dots1_local.serve.http.writer import Collected, Document, Writer, logprob, token_name

__all__ = ["ChatWriter"]


class ChatWriter(Writer):
    """A message a choice, or what is added to it."""

    prefix = "chatcmpl"
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def begin(self) -> list[Document]:
        """Who speaks, in every choice."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta=delta, logprobs=None) for index in range(self.choices)]

    def piece(self, piece: Piece) -> list[Document]:
        delta = {"content": piece.text}
        return [self._chunk(piece.index, delta=delta, logprobs=self._logprobs(piece.logprobs))]

    def finish(self, finished: Finished) -> list[Document]:
        return [self._chunk(finished.index, finished.reason, delta={}, logprobs=None)]

    def _choice(self, index: int, answer: Collected) -> Document:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": answer.finished and answer.finished.reason,
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


def _entry(piece: bytes, value: float) -> Document:
    return {"token": token_name(piece), "logprob": logprob(value), "bytes": list(piece)}
