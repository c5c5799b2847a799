"""What requests of all APIs have in common: the body, its fields, and refusals."""

import asyncio
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from msgspec import Meta
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from dots1_local.files.json_file import JsonError, brief, convert_json, parse_json

__all__ = [
    "ApiError", "Name", "Share", "Stop", "Stops", "TokenCount", "Unsupported", "check_model_name",
    "check_token", "invalid", "missing", "parse_body", "read_body", "read_fields",
    "refuse_unsupported",
]  # fmt: skip

_T = TypeVar("_T")
_MAX_BODY = 8 << 20  # bytes: 30 times the size of a prompt of 32k tokens
_BODY_SECONDS = 30.0  # for the whole body to arrive
_MAX_STOP, _MAX_STOP_LENGTH = 16, 1 << 10

Name = Annotated[str, Meta(min_length=1)]
TokenCount = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Stop = Annotated[str, Meta(min_length=1, max_length=_MAX_STOP_LENGTH)]
Stops = Annotated[list[Stop], Meta(max_length=_MAX_STOP)]
Unsupported = Mapping[str, tuple[Any, ...]]
"""Fields that are refused, because they would change the answer, unless they have one of these
values (or null), which change nothing."""
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


def refuse_unsupported(raw: Mapping[str, Any], unsupported: Unsupported) -> None:
    """Raise an ApiError if a body has an unsupported field with an effect."""
    for name, harmless in unsupported.items():
        value = raw.get(name)
        if value is not None and value not in harmless:
            raise invalid(f"{name} is not supported here; leave it out", name, "unsupported")


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


def _refusal(error: JsonError, where: str = "") -> ApiError:
    """Describe a JSON error; `param` becomes the path of the field, such as "messages[0].role"."""
    path = where + error.path.partition("[...]")[0]  # msgspec does not say which key is wrong
    kind = re.fullmatch(r"expected one of (?:input_)?text\b.*, got (.+)", error.reason)
    if kind and path.endswith("].type"):
        return invalid(f"{path} is {kind[1]}; this model reads only text", path)
    if field := re.fullmatch(r"object missing required field (\w+)", error.reason):
        return missing(f"{path}.{field[1]}".removeprefix("."))
    return invalid(f"{path or 'the body'} is invalid: {error.reason:.200}", path or None)
