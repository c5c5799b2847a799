"""POST /v1/completions: its request body and its responses."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from dots1_local.engine.engine import Engine
from dots1_local.serve.generation import Finished, Piece, Scored, TokenLogprob
from dots1_local.serve.http.request import Unsupported, check_token, invalid
from dots1_local.serve.http.response import Document, OpenAIWriter, named_logprob
from dots1_local.serve.http.shared_fields import MAX_CHOICES, Options, SharedFields
from dots1_local.serve.http.unsupported import OF_COMPLETIONS

__all__ = ["CompletionFields", "CompletionRequest", "CompletionWriter", "read_completion"]

_DEFAULT_MAX_TOKENS = 16  # OpenAI's

_OF_OTHERS = ("token_logprobs", "top_logprobs")  # which the first token has not

_TopCount = Annotated[int, Meta(ge=0, le=20)]


class CompletionFields(SharedFields, frozen=True, kw_only=True):
    """The body of a request."""

    prompt: str | list[int | str | list[int]]
    echo: bool | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None = None
    logprobs: _TopCount | None = None
    prompt_logprobs: _TopCount | None = None  # vLLM's
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    add_special_tokens: bool | None = None  # vLLM's

    unsupported: ClassVar[Unsupported] = OF_COMPLETIONS


@dataclass(frozen=True)
class CompletionRequest:
    """The prompts, each a text or token ids, and what to answer besides the completions.

    `prompt_logprobs` asks for vLLM's list, whose tokens have so many alternatives. With `bos`,
    texts begin with BOS if the model's documents do.
    """

    prompts: list[str | list[int]]
    echo: bool
    prompt_logprobs: int | None
    options: Options
    bos: bool


def read_completion(raw: Mapping[str, Any], engine: Engine) -> CompletionRequest:
    """Read a body.

    Raise an ApiError if a field is invalid or unsupported, or if fields contradict each other.
    """
    fields = CompletionFields.read(raw)
    options = fields.options(
        engine, fields.limit("max_tokens", _DEFAULT_MAX_TOKENS), fields.logprobs
    )
    wanted = [fields.prompt_logprobs, fields.logprobs if fields.echo else None]
    if scored := [count for count in wanted if count is not None]:
        options = replace(options, choice=replace(options.choice, prompt_logprobs=max(scored)))
    if fields.best_of not in (None, options.n):
        raise invalid("best_of other than n is not supported; leave it out", "best_of")
    prompts = _prompts(fields.prompt, engine.n_vocab)
    if len(prompts) * options.n > MAX_CHOICES:
        message = f"{len(prompts)} prompts with n {options.n} are more than {MAX_CHOICES} choices"
        raise invalid(f"{message}; split the request", "prompt")
    bos = fields.add_special_tokens is not False
    return CompletionRequest(prompts, bool(fields.echo), fields.prompt_logprobs, options, bos)


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
            check_token(token, n_vocab, "prompt")
    return prompts


class CompletionWriter(OpenAIWriter):
    """Writes one text for each choice, after its echo: the prompt, or None for nothing.

    `prompt_logprobs` is what a `CompletionRequest` has.
    """

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"
    no_text: ClassVar[Document] = {"text": "", "logprobs": None}

    def __init__(
        self,
        model: str,
        options: Options,
        echoes: Sequence[str | None],
        prompt_logprobs: int | None = None,
    ) -> None:
        super().__init__(model, options, len(echoes))
        self._echoes, self._prompt_logprobs = echoes, prompt_logprobs
        self._top = options.choice.top_logprobs
        # The tokens of an echo with logprobs count its characters themselves.
        self._offsets = [0 if self._has_scores(echo) else len(echo or "") for echo in echoes]
        utf8 = codecs.getincrementaldecoder("utf-8")
        self._decoders = [utf8(errors="replace") for _ in echoes]
        self._prompts: dict[int, Document] = {}  # what was scored, by choice

    def begin(self) -> list[Document]:
        """Return the prompts to echo whose logprobs are not computed first."""
        return [
            self._chunk(index, text=echo, logprobs=None)
            for index, echo in enumerate(self._echoes)
            if echo and not self._has_scores(echo)
        ]

    def scored(self, scored: Scored) -> list[Document]:
        echo = self._echoes[scored.index]
        fields: Document = {"text": "", "logprobs": None}
        if self._has_scores(echo):
            first = TokenLogprob(-1, scored.first, 0.0)
            logprobs = self._logprobs(scored.index, [first, *scored.logprobs])
            logprobs |= {key: [None, *logprobs[key][1:]] for key in _OF_OTHERS}
            fields = {"text": echo, "logprobs": logprobs}
        if self._prompt_logprobs is not None:
            entries = [_by_id(each, self._prompt_logprobs) for each in scored.logprobs]
            fields["prompt_logprobs"] = [None, *entries]
        self._prompts[scored.index] = fields
        return [self._chunk(scored.index, **fields)]

    def piece(self, piece: Piece) -> list[Document]:
        logprobs = self._answer_logprobs(piece)
        return [self._chunk(piece.index, text=piece.text, logprobs=logprobs)]

    def finish(self, finished: Finished) -> list[Document]:
        return [self._last_chunk(finished, finished.reason)]

    def _choice(self, piece: Piece, finished: Finished) -> Document:
        prompt = self._prompts.get(piece.index, {})
        logprobs = self._answer_logprobs(piece)
        if logprobs is not None and (before := prompt.get("logprobs")):
            logprobs = {key: before[key] + value for key, value in logprobs.items()}
        return prompt | {
            "index": piece.index,
            "text": (self._echoes[piece.index] or "") + piece.text,
            "logprobs": logprobs,
            "finish_reason": finished.reason,
        }

    def _has_scores(self, echo: str | None) -> bool:
        return echo is not None and self._top is not None

    def _answer_logprobs(self, piece: Piece) -> Document | None:
        return None if self._top is None else self._logprobs(piece.index, piece.logprobs)

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> Document:
        """Return OpenAI's older format: a list for each property; top includes the token itself."""
        own = [named_logprob(token.piece, token.logprob) for token in tokens]
        top = [[named_logprob(*each[1:]) for each in token.top[: self._top]] for token in tokens]
        return {
            "tokens": [name for name, _ in own],
            "token_logprobs": [logprob for _, logprob in own],
            "top_logprobs": [
                _by_name([*others, each]) for others, each in zip(top, own, strict=True)
            ],
            "text_offset": [self._offset(index, token.piece) for token in tokens],
        }

    def _offset(self, index: int, piece: bytes) -> int:
        """Return how many characters of a choice's text come before a token."""
        offset = self._offsets[index]
        self._offsets[index] += len(self._decoders[index].decode(piece))
        return offset


def _by_name(tokens: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The log-probabilities by text; of tokens with the same text, the likeliest counts."""
    found: dict[str, float] = {}
    for name, logprob in tokens:
        found[name] = max(logprob, found.get(name, logprob))
    return found


def _by_id(token: TokenLogprob, top: int) -> Document:
    """Return vLLM's form: the token itself and the likeliest ones."""
    tokens = [(token.rank, token.token, token.piece, token.logprob)]
    tokens += [(rank, *each) for rank, each in enumerate(token.top[:top], 1)]
    found = {}
    for rank, number, piece, logprob in tokens:
        name, value = named_logprob(piece, logprob)
        found[str(number)] = {"logprob": value, "rank": rank, "decoded_token": name}
    return found
