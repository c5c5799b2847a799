"""The fields of a request that say how tokens are sampled."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from dots1_local.chat.sampling import Sampling
from dots1_local.engine.engine import Engine
from dots1_local.files.json_file import brief
from dots1_local.serve.http.request import Share, invalid

__all__ = ["SamplingFields", "same"]

_MAX_BIASES = 1 << 10
_MIN_TOP_P = 1e-6  # a top_p of 0 means the likeliest token alone
_BANNED = float("-inf")

_RepeatPenalty = Annotated[float, Meta(ge=0.1, le=10)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Bias = float | Literal[False] | None  # llama-server: a token with false is never sampled
_Biases = (
    Annotated[dict[str, _Bias], Meta(max_length=_MAX_BIASES)]
    | Annotated[list[tuple[int | str, _Bias]], Meta(max_length=_MAX_BIASES)]
)


class SamplingFields(Struct, frozen=True, kw_only=True):
    """The fields with their ranges; one that is null or missing has its default."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repetition_penalty: _RepeatPenalty | None = None  # vLLM's name
    repeat_penalty: _RepeatPenalty | None = None  # llama.cpp's name
    repeat_last_n: Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)] | None = None  # llama.cpp's
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    logit_bias: _Biases | None = None

    def sampling(self, engine: Engine) -> Sampling:
        """Return the parameters, or raise an ApiError if fields contradict each other."""
        given = {
            "temperature": self.temperature,
            "top_k": self.top_k and max(self.top_k, 0),
            "top_p": None if self.top_p is None else max(self.top_p, _MIN_TOP_P),
            "min_p": self.min_p,
            "repeat_penalty": same(self, "repetition_penalty", "repeat_penalty"),
            "repeat_last_n": engine.n_ctx if self.repeat_last_n == -1 else self.repeat_last_n,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "seed": self.seed,
            "logit_bias": tuple(dict(_biases(self.logit_bias or {}, engine)).items()),
        }
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return Sampling(**chosen)


def same(fields: Struct, *names: str) -> Any:
    """Return the value of fields that mean the same, or raise an ApiError if they differ."""
    given = {name: value for name in names if (value := getattr(fields, name)) is not None}
    if len(set(given.values())) > 1:
        *_, last = given
        message = f"{' and '.join(given)} mean the same here; give one of them"
        raise invalid(message, last)
    return next(iter(given.values()), None)


def _biases(
    raw: dict[str, _Bias] | list[tuple[int | str, _Bias]], engine: Engine
) -> Iterator[tuple[int, float]]:
    """Yield the tokens with their biases; a text stands for each of its tokens.

    In an object, which is OpenAI's form, a key of digits is a token's id. In a list of pairs, which
    is llama-server's, a string always is a text.
    """
    pairs = raw if isinstance(raw, list) else [(_key(key), bias) for key, bias in raw.items()]
    for token, bias in pairs:
        if bias is None:
            continue
        if isinstance(bias, float) and not -100 <= bias <= 100:
            name = f"logit_bias.{token}"[:80]
            raise invalid(f"{name} is {bias:g}; it must be from -100 to 100", name)
        for each in _tokens(token, engine):
            yield each, _BANNED if bias is False else bias


def _key(key: str) -> int | str:
    return int(key) if key.isascii() and key.isdigit() and len(key) < 10 else key


def _tokens(token: int | str, engine: Engine) -> list[int]:
    tokens = [token] if isinstance(token, int) else engine.tokenize(token, special=False)
    if not tokens or not all(0 <= each < engine.n_vocab for each in tokens):
        message = f"logit_bias has {brief(token)}, not a token id from 0 to {engine.n_vocab - 1}"
        raise invalid(message, "logit_bias")
    return tokens
