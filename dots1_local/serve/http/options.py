"""The options of both endpoints: sampling, length, stop strings, format, streaming."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dots1_local.chat.grammar import Grammar
from dots1_local.chat.sampling import Sampling
from dots1_local.errors import UsageError
from dots1_local.files.json_file import brief
from dots1_local.serve.generation import Order
from dots1_local.serve.http.body import Fields
from dots1_local.serve.http.errors import invalid

__all__ = ["MOST_CHOICES", "MOST_TOKENS", "Options", "refuse_unsupported", "take_options"]

MOST_CHOICES = 128  # of a request, as OpenAI's
MOST_TOKENS = (1 << 31) - 1
_MOST_STOPS = 16
_LONGEST_STOP = 1 << 10
_MOST_BIASES = 1 << 10
_SEEDS = 1 << 63
_SMALLEST_SHARE = 1e-6  # for a top_p of 0: the likeliest token alone

# Fields that are not supported and would change the answer, with the values that would not.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "grammar": ("",),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "json_schema": ({},),
    "length_penalty": (1,),
    "lora": ([],),
    "min_tokens": (0,),
    "mirostat": (0,),
    "prompt_logprobs": (),
    "samplers": (),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
}


@dataclass(frozen=True)
class Options:
    """How a request's choices are to be written and sent; there are `n` for each prompt."""

    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    n: int
    stream: bool
    include_usage: bool
    grammar: Grammar | None
    top_logprobs: int | None

    def orders(self, prompt: tuple[int, ...]) -> Iterator[Order]:
        """One prompt's choices; if there is a seed, each choice has its own: seed + index."""
        for index in range(self.n):
            seed = self.sampling.seed
            sampling = self.sampling if seed is None else replace(self.sampling, seed=seed + index)
            yield Order(
                prompt, sampling, self.max_tokens, self.stop, self.grammar, self.top_logprobs
            )


def take_options(
    fields: Fields, n_vocab: int, max_tokens: int | None, top_logprobs: int | None
) -> Options:
    """The options in a request's body.

    Raises:
        ApiError: one is not what it must be.
    """
    stream = fields.boolean("stream")
    stream_options = fields.group("stream_options")
    if stream_options and not stream:
        raise invalid("stream_options is for streams; set stream to true", "stream_options")
    return Options(
        sampling=_sampling(fields, n_vocab),
        max_tokens=max_tokens,
        stop=_stop(fields),
        n=fields.integer("n", 1, MOST_CHOICES) or 1,
        stream=stream,
        include_usage=bool(stream_options and stream_options.boolean("include_usage")),
        grammar=_grammar(fields),
        top_logprobs=top_logprobs,
    )


def refuse_unsupported(fields: Fields, more: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse fields that would have to change the answer, but are not supported.

    Raises:
        ApiError: one is set, and not to a value without effect.
    """
    for name, harmless in {**_UNSUPPORTED, **more}.items():
        value = fields.value(name)
        if value is not None and value not in harmless:
            raise invalid(f"{name} is not supported here; leave it out", name, "unsupported")


def _sampling(fields: Fields, n_vocab: int) -> Sampling:
    top_k = fields.integer("top_k", -1, MOST_TOKENS)
    top_p = fields.number("top_p", 0, 1)
    given = {
        "temperature": fields.number("temperature", 0, 2),
        "top_k": top_k and max(top_k, 0),
        "top_p": None if top_p is None else max(top_p, _SMALLEST_SHARE),
        "min_p": fields.number("min_p", 0, 1),
        "repeat_penalty": _repeat_penalty(fields),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "seed": fields.integer("seed", -_SEEDS, _SEEDS - 1),
        "logit_bias": _logit_bias(fields, n_vocab),
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Sampling(**chosen)


def _repeat_penalty(fields: Fields) -> float | None:
    """The penalty under its two names, vLLM's and llama.cpp's."""
    first, second = "repetition_penalty", "repeat_penalty"
    one, other = (fields.number(name, 0.1, 10) for name in (first, second))
    if one is not None and other is not None and one != other:
        raise invalid(f"{first} and {second} mean the same here; give one of them", second)
    return other if one is None else one


def _logit_bias(fields: Fields, n_vocab: int) -> tuple[tuple[int, float], ...] | None:
    raw = fields.value("logit_bias")
    if raw is None:
        return None
    biases = Fields(raw, "logit_bias.")
    if len(raw) > _MOST_BIASES:
        raise invalid(f"logit_bias has {len(raw):,} tokens; {_MOST_BIASES:,} are possible")
    for token in raw:
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < n_vocab):
            message = f"logit_bias has {brief(token)}, not a token's id from 0 to {n_vocab - 1}"
            raise invalid(message, "logit_bias")
    taken = {int(token): biases.number(token, -100, 100) for token in raw}
    return tuple((token, bias) for token, bias in taken.items() if bias is not None)


def _stop(fields: Fields) -> tuple[str, ...]:
    raw = fields.value("stop")
    stops = [] if raw is None else [raw] if isinstance(raw, str) else raw
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS:
        raise fields.wrong("stop", f"a string, or a list of at most {_MOST_STOPS}")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= _LONGEST_STOP:
            wanted = f"a string of 1 to {_LONGEST_STOP:,} characters"
            raise invalid(f"stop has {brief(stop)} in it, not {wanted}", "stop")
    return tuple(stops)


def _grammar(fields: Fields) -> Grammar | None:
    wanted = fields.group("response_format")
    if wanted is None:
        return None
    kind = wanted.choice("type", ("text", "json_object", "json_schema"))
    if kind is None:
        raise wanted.required("type", "text, json_object or json_schema")
    try:
        if kind == "json_schema":
            return _schema_grammar(wanted)
        return Grammar.json_object() if kind == "json_object" else None
    except UsageError as error:
        raise invalid(str(error), "response_format") from None


def _schema_grammar(wanted: Fields) -> Grammar:
    described = wanted.group("json_schema")
    if described is None:
        raise wanted.required("json_schema", "an object with a name and a schema")
    schema = described.value("schema")
    if schema is None:
        raise described.required("schema", "a JSON schema")
    return Grammar.of_json_schema(schema)
