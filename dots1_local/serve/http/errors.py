"""Errors that a request is refused with, in the shape of OpenAI's."""

import logging
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

__all__ = ["HANDLERS", "ApiError", "invalid"]

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A refusal: the HTTP status, a sentence, and the parameter that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.headers = param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that the client gets."""
        general = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, general),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The refusal of a request that is malformed, or asks for something unsupported."""
    return ApiError(400, message, param=param, code=code)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _refuse_path(request: Request, error: Exception) -> Response:
    """A path or method that does not exist."""
    assert isinstance(error, HTTPException)
    path = f"{request.url.path:.80}"
    if error.status_code == 405:
        message = f"{path} does not know {request.method}"
    else:
        message = (
            f"there is no {path} here, but /v1/chat/completions, /v1/completions and /v1/models"
        )
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _drop(request: Request, error: Exception) -> Response:
    """A client that left while it was sending; nobody will read this."""
    return Response(status_code=400)


async def _fail(request: Request, error: Exception) -> Response:
    """A bug: the details are for the log alone."""
    logging.getLogger(__name__).error("%s failed", request.url.path, exc_info=error)
    return ApiError(500, "something went wrong in the server; its log says what").response()


HANDLERS: Mapping[Any, Any] = {
    ApiError: _refuse,
    HTTPException: _refuse_path,
    ClientDisconnect: _drop,
    Exception: _fail,
}
