"""POST /v1/completions: its request body and its responses."""

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from dots1_local.files.json_file import brief
from dots1_local.serve.generation import Finished, Piece, TokenLogprob
from dots1_local.serve.http.request import (
    MAX_CHOICES,
    Options,
    SharedFields,
    convert_body,
    invalid,
    read_options,
)
from dots1_local.serve.http.response import (
    ChoiceText,
    Document,
    Writer,
    json_logprob,
    token_name,
)

__all__ = ["CompletionRequest", "CompletionWriter", "read_completion"]

_DEFAULT_MAX_TOKENS = 16  # OpenAI's

Prompt = str | tuple[int, ...]  # a text or token ids


class _CompletionFields(SharedFields, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SharedFields.unsupported,
        "suffix": ("",),
    }


@dataclass(frozen=True)
class CompletionRequest:
    """Prompts to complete; with `echo` each answer begins with its prompt."""

    prompts: tuple[Prompt, ...]
    echo: bool
    options: Options


def read_completion(raw: Mapping[str, Any], n_vocab: int) -> CompletionRequest:
    """Read the body of a completion request.

    Raises:
        ApiError: a field is invalid or unsupported, or fields contradict each other.
    """
    fields = convert_body(raw, _CompletionFields)
    if fields.echo and fields.logprobs is not None:
        raise invalid("echo with logprobs is not supported; leave out one of them", "echo")
    options = read_options(
        fields, n_vocab, fields.max_tokens or _DEFAULT_MAX_TOKENS, fields.logprobs
    )
    if fields.best_of not in (None, options.n):
        raise invalid("best_of other than n is not supported; leave it out", "best_of")
    prompts = _prompts(fields.prompt, n_vocab)
    if len(prompts) * options.n > MAX_CHOICES:
        message = f"{len(prompts)} prompts with n {options.n} are more than {MAX_CHOICES} choices"
        raise invalid(f"{message}; split the request", "prompt")
    return CompletionRequest(prompts, bool(fields.echo), options)


def _prompts(given: str | list[Any], n_vocab: int) -> tuple[Prompt, ...]:
    """Return the prompts in a string, a list of token ids, or a list of either."""
    single = isinstance(given, str) or all(isinstance(each, int) for each in given)
    prompts = [given] if single else given
    if any(isinstance(each, int) for each in prompts):
        raise invalid("prompt mixes token ids with texts; give a list of either", "prompt")
    if not all(prompts):
        raise invalid("prompt is empty; give the beginning of a text", "prompt")
    return tuple(each if isinstance(each, str) else _tokens(each, n_vocab) for each in prompts)


def _tokens(given: list[int], n_vocab: int) -> tuple[int, ...]:
    for token in given:
        if not 0 <= token < n_vocab:
            message = f"prompt has {brief(token)}, not a token id from 0 to {n_vocab - 1}"
            raise invalid(message, "prompt")
    return tuple(given)


class CompletionWriter(Writer):
    """Writes one text for each choice, after its echo: the prompt or nothing."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(self, model: str, options: Options, echoes: Sequence[str]) -> None:
        super().__init__(model, options, len(echoes))
        self._echoes = echoes
        self._offsets = [_TextOffset(len(echo)) for echo in echoes]

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

    def _choice(self, index: int, choice: ChoiceText) -> Document:
        return {
            "index": index,
            "text": self._echoes[index] + choice.text,
            "logprobs": self._logprobs(index, choice.logprobs),
            "finish_reason": choice.finished and choice.finished.reason,
        }

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> Document | None:
        """Return OpenAI's older format: a list for each property; top includes the token itself."""
        if self.options.top_logprobs is None:
            return None
        return {
            "tokens": [token_name(token.piece) for token in tokens],
            "token_logprobs": [json_logprob(token.logprob) for token in tokens],
            "top_logprobs": [_top(token) for token in tokens],
            "text_offset": [self._offsets[index].before(token.piece) for token in tokens],
        }


class _TextOffset:
    """Counts the characters of a text before each token."""

    def __init__(self, start: int) -> None:
        self._count = start
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def before(self, piece: bytes) -> int:
        offset = self._count
        self._count += len(self._decoder.decode(piece))
        return offset


def _top(token: TokenLogprob) -> dict[str, float]:
    likeliest = {token_name(piece): json_logprob(value) for _, piece, value in token.top}
    return likeliest | {token_name(token.piece): json_logprob(token.logprob)}
