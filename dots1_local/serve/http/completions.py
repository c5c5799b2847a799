"""POST /v1/completions: its request body and its responses."""

import codecs
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from dots1_local.engine.engine import Engine
from dots1_local.files.json_file import brief
from dots1_local.serve.generation import Finished, Piece, TokenLogprob
from dots1_local.serve.http.request import MAX_CHOICES, Options, SharedFields, invalid
from dots1_local.serve.http.response import Document, Writer, named_logprob

__all__ = ["CompletionWriter", "read_completion"]

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


class _CompletionFields(SharedFields, frozen=True, kw_only=True):
    prompt: str | list[int | str | list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SharedFields.unsupported,
        "suffix": ("",),
    }


def read_completion(
    raw: Mapping[str, Any], engine: Engine
) -> tuple[list[str | list[int]], bool, Options]:
    """Return the prompts, each a text or token ids, whether to echo them, and the options.

    Raise an ApiError if a field is invalid or unsupported, or if fields contradict each other.
    """
    fields = _CompletionFields.read(raw)
    if fields.echo and fields.logprobs is not None:
        raise invalid("echo with logprobs is not supported; leave out one of them", "echo")
    max_tokens = fields.max_tokens or _DEFAULT_MAX_TOKENS
    options = fields.options(engine, max_tokens, fields.logprobs)
    if fields.best_of not in (None, options.n):
        raise invalid("best_of other than n is not supported; leave it out", "best_of")
    prompts = _prompts(fields.prompt, engine.n_vocab)
    if len(prompts) * options.n > MAX_CHOICES:
        message = f"{len(prompts)} prompts with n {options.n} are more than {MAX_CHOICES} choices"
        raise invalid(f"{message}; split the request", "prompt")
    return prompts, bool(fields.echo), options


def _prompts(given: Any, n_vocab: int) -> list[str | list[int]]:
    """Return the prompts in a string, a list of token ids, or a list of either."""
    single = isinstance(given, str) or all(isinstance(each, int) for each in given)
    prompts = [given] if single else given
    if not all(prompts):
        raise invalid("prompt is empty; give the beginning of a text", "prompt")
    for prompt in prompts:
        if isinstance(prompt, int):
            raise invalid("prompt mixes token ids with texts; give a list of either", "prompt")
        for token in prompt if isinstance(prompt, list) else ():
            if not 0 <= token < n_vocab:
                message = f"prompt has {brief(token)}, not a token id from 0 to {n_vocab - 1}"
                raise invalid(message, "prompt")
    return prompts


class CompletionWriter(Writer):
    """Writes one text for each choice, after its echo: the prompt or nothing."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(self, model: str, options: Options, echoes: Sequence[str]) -> None:
        super().__init__(model, options, len(echoes))
        self._echoes = echoes
        self._offsets = [len(echo) for echo in echoes]
        utf8 = codecs.getincrementaldecoder("utf-8")
        self._decoders = [utf8(errors="replace") for _ in echoes]

    def begin(self) -> list[Document]:
        """Return the prompts to echo."""
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

    def _choice(self, piece: Piece, finished: Finished) -> Document:
        return {
            "index": piece.index,
            "text": self._echoes[piece.index] + piece.text,
            "logprobs": self._logprobs(piece.index, piece.logprobs),
            "finish_reason": finished.reason,
        }

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> Document | None:
        """Return OpenAI's older format: a list for each property; top includes the token itself."""
        if self.options.choice.top_logprobs is None:
            return None
        own = [named_logprob(token.piece, token.logprob) for token in tokens]
        top = [dict(named_logprob(*each[1:]) for each in token.top) for token in tokens]
        return {
            "tokens": [name for name, _ in own],
            "token_logprobs": [logprob for _, logprob in own],
            "top_logprobs": [others | dict([each]) for others, each in zip(top, own, strict=True)],
            "text_offset": [self._offset(index, token.piece) for token in tokens],
        }

    def _offset(self, index: int, piece: bytes) -> int:
        """Return how many characters of a choice's text come before a token."""
        offset = self._offsets[index]
        self._offsets[index] += len(self._decoders[index].decode(piece))
        return offset
