"""The responses of POST /v1/completions."""

import codecs
from collections.abc import Sequence

from dots1_local.serve.generation import Finished, Piece, TokenLogprob
from dots1_local.serve.http.options import Options
from dots1_local.serve.http.writer import Collected, Document, Writer, logprob, token_name

__all__ = ["CompletionWriter"]


class CompletionWriter(Writer):
    """One text for each choice; `echoes` are what they begin with, a prompt or nothing."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(self, model: str, options: Options, echoes: Sequence[str]) -> None:
        super().__init__(model, options, len(echoes))
        self._echoes = echoes
        self._offsets = [_Offset(len(echo)) for echo in echoes]

    def begin(self) -> list[Document]:
        """The prompts, where they are to be echoed."""
        return [
            self._chunk(index, text=echo, logprobs=None)
            for index, echo in enumerate(self._echoes)
            if echo
        ]

    def piece(self, piece: Piece) -> list[Document]:
        logprobs = self._logprobs(piece.index, piece.logprobs)
        return [self._chunk(piece.index, text=piece.text, logprobs=logprobs)]

    def finish(self, finished: Finished) -> list[Document]:
        return [self._chunk(finished.index, finished.reason, text="", logprobs=None)]

    def _choice(self, index: int, answer: Collected) -> Document:
        return {
            "index": index,
            "text": self._echoes[index] + answer.text,
            "logprobs": self._logprobs(index, answer.logprobs),
            "finish_reason": answer.finished and answer.finished.reason,
        }

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> Document | None:
        """OpenAI's older layout: one list per property; the token itself is among the top."""
        if self.options.top_logprobs is None:
            return None
        return {
            "tokens": [token_name(token.piece) for token in tokens],
            "token_logprobs": [logprob(token.logprob) for token in tokens],
            "top_logprobs": [_top(token) for token in tokens],
            "text_offset": [self._offsets[index].before(token.piece) for token in tokens],
        }


class _Offset:
    """How many characters of a text come before a token."""

    def __init__(self, start: int) -> None:
        self._count = start
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def before(self, piece: bytes) -> int:
        offset = self._count
        self._count += len(self._decoder.decode(piece))
        return offset


def _top(token: TokenLogprob) -> dict[str, float]:
    likeliest = {token_name(piece): logprob(value) for _, piece, value in token.top}
    return likeliest | {token_name(token.piece): logprob(token.logprob)}
