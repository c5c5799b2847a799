"""The body of POST /v1/completions.

The responses of POST /v1/completions.
"""

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dots1_local.files.json_file import brief
from dots1_local.serve.generation import Finished, Piece, TokenLogprob
from dots1_local.serve.http.answering import Collected, Document, Writer, logprob, token_name
from dots1_local.serve.http.body import Fields
from dots1_local.serve.http.errors import ApiError, invalid
from dots1_local.serve.http.options import (
    MOST_CHOICES,
    MOST_TOKENS,
    Options,
    refuse_unsupported,
    take_options,
)

__all__ = [
    "CompletionRequest",
    "CompletionWriter",
    "take_completion",
]


_USUAL_LENGTH = 16  # tokens, OpenAI's
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {"suffix": ("",)}


@dataclass(frozen=True)
class CompletionRequest:
    """Texts to complete, each a string or token ids; with `echo` the answers begin with them."""

    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool
    options: Options


def take_completion(fields: Fields, n_vocab: int) -> CompletionRequest:
    """The request in a body.

    Raises:
        ApiError: a field is not what it must be.
    """
    refuse_unsupported(fields, _UNSUPPORTED)
    echo, logprobs = fields.boolean("echo"), fields.integer("logprobs", 0, 5)
    if echo and logprobs is not None:
        raise invalid("echo with logprobs is not supported; leave out one of them", "echo")
    max_tokens = fields.integer("max_tokens", 1, MOST_TOKENS)
    options = take_options(
        fields, n_vocab, _USUAL_LENGTH if max_tokens is None else max_tokens, logprobs
    )
    if (fields.integer("best_of", 1, MOST_CHOICES) or options.n) != options.n:
        raise invalid("best_of other than n is not supported; leave it out", "best_of")
    prompts = tuple(_prompts(fields, n_vocab))
    if len(prompts) * options.n > MOST_CHOICES:
        message = f"{len(prompts)} prompts with n {options.n} are more than {MOST_CHOICES} choices"
        raise invalid(f"{message}; send them apart", "prompt")
    return CompletionRequest(prompts, echo, options)


def _prompts(fields: Fields, n_vocab: int) -> Sequence[str | tuple[int, ...]]:
    raw = fields.value("prompt")
    if raw is None:
        raise fields.required("prompt", "the beginning of a text")
    prompts = raw if isinstance(raw, list) and not _of_tokens(raw) else [raw]
    if not prompts or not all(prompts):
        raise invalid("prompt is empty; give the beginning of a text", "prompt")
    return [_prompt(prompt, fields, n_vocab) for prompt in prompts]


def _of_tokens(raw: list[Any]) -> bool:
    return bool(raw) and type(raw[0]) in (int, float, bool)


def _prompt(prompt: Any, fields: Fields, n_vocab: int) -> str | tuple[int, ...]:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise fields.wrong("prompt", "a string, token ids, or a list of either")
    for token in prompt:
        if type(token) is not int or not 0 <= token < n_vocab:
            raise _no_token(token, n_vocab)
    return tuple(prompt)


def _no_token(token: Any, n_vocab: int) -> ApiError:
    return invalid(f"prompt has {brief(token)}, not a token's id from 0 to {n_vocab - 1}", "prompt")


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
