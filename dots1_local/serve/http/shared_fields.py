"""The fields that bodies of chats and completions have in common."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from msgspec import Meta, Struct

from dots1_local.chat.constraint import Constraint, LateEnd
from dots1_local.engine.engine import Engine
from dots1_local.serve.generation import GenerationRequest
from dots1_local.serve.http.formats import FormatFields
from dots1_local.serve.http.request import (
    Stop,
    Stops,
    TokenCount,
    Unsupported,
    check_token,
    invalid,
    read_fields,
    refuse_unsupported,
)
from dots1_local.serve.http.sampling_fields import same
from dots1_local.serve.http.unsupported import OF_ALL

__all__ = ["MAX_CHOICES", "Options", "SharedFields"]

MAX_CHOICES = 128  # per request, OpenAI's limit
_MAX_STOP_TOKENS = 1 << 10
_UNLIMITED = -1

_Count = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
_CountOrAll = Annotated[int, Meta(ge=_UNLIMITED, le=(1 << 31) - 1)]
_Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]


@dataclass(frozen=True)
class Options:
    """How to generate and send choices: `n` for each prompt, each like `choice`.

    A prompt is cut to its last `truncate_to` tokens, or its first if `from_start`; -1 means the
    room in the context.
    """

    choice: GenerationRequest  # without a prompt
    n: int
    stream: bool
    include_usage: bool
    truncate_to: int | None = None
    from_start: bool = False

    def requests(self, prompt: tuple[int, ...]) -> Iterator[GenerationRequest]:
        """Yield a prompt's choices; with a seed, choice i has the seed plus i."""
        seed = self.choice.sampling.seed
        for index in range(self.n):
            each = None if seed is None else seed + index
            sampling = replace(self.choice.sampling, seed=each)
            yield replace(self.choice, prompt=prompt, sampling=sampling)

    def truncated(self, tokens: list[int], n_ctx: int) -> list[int]:
        """Return the part of a prompt that the request asks for."""
        if self.truncate_to is None:
            return tokens
        answer = self.choice.max_tokens
        room = max(1, n_ctx - (1 if answer is None else answer))
        length = room if self.truncate_to == _UNLIMITED else self.truncate_to
        return tokens[:length] if self.from_start else tokens[-length:]


class _StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None


class SharedFields(FormatFields, frozen=True, kw_only=True):
    """The fields with their ranges; unknown fields are ignored.

    A field that is null or missing has its default. `unsupported` lists fields that would change
    the answer but are not supported.
    """

    model: str | None = None
    max_tokens: TokenCount | None = None
    n_predict: _CountOrAll | None = None  # llama-server's name of max_tokens
    n: _Choices | None = None
    n_cmpl: _Choices | None = None  # llama-server's name of n
    stop: Stop | Stops | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=_MAX_STOP_TOKENS)] | None = None  # vLLM's
    min_tokens: _Count | None = None  # vLLM's
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None  # llama-server's
    truncate_prompt_tokens: Annotated[int, Meta(ge=_UNLIMITED)] | None = None  # vLLM's
    truncation_side: Literal["left", "right"] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    return_progress: bool | None = None  # llama-server's

    unsupported: ClassVar[Unsupported] = OF_ALL

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Self:
        """Convert a body, or raise an ApiError that names the wrong field."""
        fields = read_fields(raw, cls)
        refuse_unsupported(raw, cls.unsupported)
        return fields

    def limit(self, name: str, default: int | None = None) -> int | None:
        """Return the most tokens of an answer, from the field `name` or n_predict."""
        wanted: int | None = same(self, name, "n_predict")
        if wanted is None:
            return default
        return None if wanted == _UNLIMITED else wanted

    def options(self, engine: Engine, max_tokens: int | None, top_logprobs: int | None) -> Options:
        """Return the options, or raise an ApiError if fields contradict each other."""
        if self.stream_options and not self.stream:
            raise invalid("stream_options needs stream; set stream to true", "stream_options")
        if self.truncate_prompt_tokens == 0:
            raise invalid("truncate_prompt_tokens is 0; give 1 or more", "truncate_prompt_tokens")
        stop_tokens = frozenset(self.stop_token_ids or ())
        for token in stop_tokens:
            check_token(token, engine.n_vocab, "stop_token_ids")
        choice = GenerationRequest(
            prompt=(),
            sampling=self.sampling(engine),
            max_tokens=max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_tokens=stop_tokens,
            grammar=self._constraint(engine, stop_tokens),
            top_logprobs=top_logprobs,
            progress=bool(self.stream and self.return_progress),
            cache_prompt=self.cache_prompt is not False,
        )
        return Options(
            choice,
            n=same(self, "n", "n_cmpl") or 1,
            stream=bool(self.stream),
            include_usage=bool(self.stream_options and self.stream_options.include_usage),
            truncate_to=self.truncate_prompt_tokens,
            from_start=self.truncation_side == "right",
        )

    @property
    def least_tokens(self) -> int | None:
        """How many tokens come before one that ends the answer; None if none may end it."""
        return None if self.ignore_eos else self.min_tokens or 0

    def _constraint(self, engine: Engine, stop_tokens: frozenset[int]) -> Constraint | None:
        form = self.format
        if self.least_tokens == 0:
            return form.compile(engine) if form else None
        if form:
            self.refuse_late_end(form.param)
        return LateEnd(
            self.least_tokens,
            lambda token: token in stop_tokens or engine.is_end(token),
            engine.n_vocab,
        )

    def refuse_late_end(self, other: str) -> None:
        """Raise an ApiError if the answer may not end where the field `other` says it must."""
        if self.least_tokens != 0:
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise invalid(f"{name} together with {other} is not supported; leave one out", name)
