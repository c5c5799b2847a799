"""What chat and completion requests have in common: the body, shared fields, and refusals."""

import asyncio
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import msgspec
from msgspec import Meta
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from dots1_local.chat.grammar import Grammar
from dots1_local.chat.sampling import Sampling
from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error
from dots1_local.files.json_file import JsonError, brief, convert_json, parse_json
from dots1_local.serve.generation import GenerationRequest

__all__ = [
    "MAX_CHOICES", "ApiError", "Name", "Options", "SharedFields", "Stops", "TokenCount",
    "check_model_name", "check_token", "invalid", "missing", "parse_body", "read_body",
    "read_fields",
]  # fmt: skip

_T = TypeVar("_T")
MAX_CHOICES = 128  # per request, OpenAI's limit
_MAX_BODY = 8 << 20  # bytes: 30 times the size of a prompt of 32k tokens
_BODY_SECONDS = 30.0  # for the whole body to arrive
_MAX_STOP, _MAX_STOP_LENGTH = 16, 1 << 10
_MAX_BIASES = 1 << 10
_MIN_TOP_P = 1e-6  # a top_p of 0 means the likeliest token alone

Name = Annotated[str, Meta(min_length=1)]
TokenCount = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_RepeatPenalty = Annotated[float, Meta(ge=0.1, le=10)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Stop = Annotated[str, Meta(min_length=1, max_length=_MAX_STOP_LENGTH)]
Stops = Annotated[list[_Stop], Meta(max_length=_MAX_STOP)]
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_ANTHROPIC_TYPES = {413: "request_too_large", 503: "overloaded_error"}


class ApiError(HTTPException):
    """A refusal: the HTTP status, one sentence, and the parameter at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that the client receives, in the shape of OpenAI's errors."""
        general = "server_error" if self.status_code >= 500 else "invalid_request_error"
        kind = _ERROR_TYPES.get(self.status_code, general)
        error = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def anthropic(self) -> dict[str, Any]:
        """The JSON in the shape of Anthropic's errors."""
        general = "api_error" if self.status_code >= 500 else "invalid_request_error"
        kind = _ANTHROPIC_TYPES.get(self.status_code, _ERROR_TYPES.get(self.status_code, general))
        return {"type": "error", "error": {"type": kind, "message": self.detail}}

    def response(self, path: str = "") -> JSONResponse:
        """The response, in the shape that clients of this path expect."""
        body = self.anthropic if path.startswith("/v1/messages") else self.body
        return JSONResponse(body, self.status_code, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Refuse a request that is malformed or asks for something unsupported."""
    return ApiError(400, message, param=param, code=code)


def missing(param: str) -> ApiError:
    """Refuse a request without a required field."""
    return invalid(f"{param} is missing", param)


def check_model_name(asked: Any, served: str) -> None:
    """Raise an ApiError if a request names another model than the served one."""
    if isinstance(asked, str) and asked != served:
        message = f"there is no model {asked!r:.80} here, only {served!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def read_fields(raw: Any, kind: type[_T], where: str = "") -> _T:
    """Convert the parsed JSON at the path `where`, or raise an ApiError that names the field."""
    try:
        return convert_json(raw, kind)
    except JsonError as error:
        raise _refusal(error, where) from None


def check_token(token: int, n_vocab: int, param: str) -> None:
    """Raise an ApiError if a client's token does not exist."""
    if not 0 <= token < n_vocab:
        message = f"{param} has {brief(token)}, not a token id from 0 to {n_vocab - 1}"
        raise invalid(message, param)


async def read_body(request: Request) -> bytes:
    """Read a body, or raise an ApiError if it is not JSON, too large, or arrives too slowly."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        # Browsers let any web page post other types; for JSON they ask the server first (CORS).
        raise ApiError(415, "the body must be JSON; send Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > _MAX_BODY:
                    raise ApiError(413, f"the body is larger than {_MAX_BODY >> 20} MiB")
    except TimeoutError:
        message = f"the body did not arrive within {_BODY_SECONDS:.0f} seconds"
        raise ApiError(408, message, headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(400, "the client disconnected") from None  # nobody reads this
    return bytes(body)


def parse_body(body: bytes) -> dict[str, Any]:
    """Parse a body, or raise an ApiError if it is not strict JSON or not an object."""
    try:
        return convert_json(parse_json(body), dict[str, Any])
    except JsonError as error:
        raise _refusal(error) from None


@dataclass(frozen=True)
class Options:
    """How to generate and send choices: `n` for each prompt, each like `choice`."""

    choice: GenerationRequest  # without a prompt
    n: int
    stream: bool
    include_usage: bool

    def requests(self, prompt: tuple[int, ...]) -> Iterator[GenerationRequest]:
        """Yield a prompt's choices; with a seed, choice i has the seed plus i."""
        seed = self.choice.sampling.seed
        for index in range(self.n):
            each = None if seed is None else seed + index
            sampling = replace(self.choice.sampling, seed=each)
            yield replace(self.choice, prompt=prompt, sampling=sampling)


class _StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class _NamedSchema(msgspec.Struct, frozen=True):
    schema: dict[str, Any] | bool


class _ResponseFormat(msgspec.Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _NamedSchema | None = None


class SharedFields(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that both endpoints know, with their ranges; unknown fields are ignored.

    A field that is null or missing has its default. `unsupported` lists fields that would change
    the answer but are not supported, with the values that have no effect.
    """

    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)] | None = None
    top_p: _Share | None = None
    min_p: _Share | None = None
    repetition_penalty: _RepeatPenalty | None = None  # vLLM's name
    repeat_penalty: _RepeatPenalty | None = None  # llama.cpp's name
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    logit_bias: Annotated[dict[str, float | None], Meta(max_length=_MAX_BIASES)] | None = None
    max_tokens: TokenCount | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: _Stop | Stops | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    return_progress: bool | None = None  # llama.cpp's
    response_format: _ResponseFormat | None = None

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "grammar": ("",),
        **dict.fromkeys(("chat_template_kwargs", "json_schema"), ({},)),
        **dict.fromkeys(("ignore_eos", "use_beam_search"), (False,)),
        **dict.fromkeys(("length_penalty", "typical_p"), (1,)),
        **dict.fromkeys(("min_tokens", "mirostat"), (0,)),
        **dict.fromkeys(("bad_words", "lora", "stop_token_ids"), ([],)),
        **dict.fromkeys(("chat_template", "samplers", "structured_outputs"), ()),
        **dict.fromkeys(("guided_choice", "guided_grammar", "guided_json", "guided_regex"), ()),
    }

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Self:
        """Convert a body, or raise an ApiError that names the wrong field."""
        fields = read_fields(raw, cls)
        for name, harmless in cls.unsupported.items():
            value = raw.get(name)
            if value is not None and value not in harmless:
                raise invalid(f"{name} is not supported here; leave it out", name, "unsupported")
        return fields

    @property
    def schema(self) -> Any:
        """The JSON schema of the answer, or None if the answer is text."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return {"type": "object"}
        if wanted.json_schema is None:
            raise missing("response_format.json_schema")
        return wanted.json_schema.schema

    def options(self, engine: Engine, max_tokens: int | None, top_logprobs: int | None) -> Options:
        """Return the options, or raise an ApiError if fields contradict each other."""
        if self.stream_options and not self.stream:
            raise invalid("stream_options needs stream; set stream to true", "stream_options")
        try:
            grammar = None if self.schema is None else Grammar(self.schema, engine)
        except Dots1Error as error:
            raise invalid(str(error), "response_format") from None
        choice = GenerationRequest(
            prompt=(),
            sampling=self._sampling(engine.n_vocab),
            max_tokens=max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            grammar=grammar,
            top_logprobs=top_logprobs,
            progress=bool(self.stream and self.return_progress),
        )
        include_usage = bool(self.stream_options and self.stream_options.include_usage)
        return Options(choice, self.n or 1, bool(self.stream), include_usage)

    def _sampling(self, n_vocab: int) -> Sampling:
        given = {
            "temperature": self.temperature,
            "top_k": self.top_k and max(self.top_k, 0),
            "top_p": None if self.top_p is None else max(self.top_p, _MIN_TOP_P),
            "min_p": self.min_p,
            "repeat_penalty": self._repeat_penalty(),
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "seed": self.seed,
            "logit_bias": tuple(_biases(self.logit_bias or {}, n_vocab).items()),
        }
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return Sampling(**chosen)

    def _repeat_penalty(self) -> float | None:
        one, other = self.repetition_penalty, self.repeat_penalty
        if one is not None and other is not None and one != other:
            message = "repetition_penalty and repeat_penalty mean the same here; give one of them"
            raise invalid(message, "repeat_penalty")
        return other if one is None else one


def _refusal(error: JsonError, where: str = "") -> ApiError:
    """Describe a JSON error; `param` becomes the path of the field, such as "messages[0].role"."""
    path = where + error.path.partition("[...]")[0]  # msgspec does not say which key is wrong
    kind = re.fullmatch(r"expected one of (?:input_)?text\b.*, got (.+)", error.reason)
    if kind and path.endswith("].type"):
        return invalid(f"{path} is {kind[1]}; this model reads only text", path)
    if field := re.fullmatch(r"object missing required field (\w+)", error.reason):
        return missing(f"{path}.{field[1]}".removeprefix("."))
    return invalid(f"{path or 'the body'} is invalid: {error.reason:.200}", path or None)


def _biases(raw: Mapping[str, float | None], n_vocab: int) -> dict[int, float]:
    biases = {}
    for token, bias in raw.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < n_vocab):
            message = f"logit_bias has {brief(token)}, not a token id from 0 to {n_vocab - 1}"
            raise invalid(message, "logit_bias")
        if bias is not None:
            if not -100 <= bias <= 100:
                name = f"logit_bias.{token}"
                raise invalid(f"{name} is {bias:g}; it must be from -100 to 100", name)
            biases[int(token)] = bias
    return biases
