"""The endpoints, which are those of OpenAI's API, and who may use them.

uvicorn's connections, bounded in number and in how long they may be without a request.
"""

import asyncio
import hmac
import logging
import resource
from collections.abc import Mapping, Sequence
from typing import Any

import h11
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dots1_local.serve.http.request import ApiError, check_model_name
from dots1_local.serve.http.service import RETRY_SOON, Model, Service

__all__ = [
    "BACKLOG",
    "IDLE_SECONDS",
    "Connection",
    "allow_files",
    "make_app",
]


def make_app(
    service: Service, *, api_key: str | None = None, origins: Sequence[str] = ()
) -> Starlette:
    """The ASGI application; web pages from `origins` may use it too, "*" for any."""

    async def health(request: Request) -> Response:
        document = {"status": service.status, **service.load}
        if service.status == "ok":
            return JSONResponse(document)
        return JSONResponse(document, 503, RETRY_SOON)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_entry(service)]})

    async def model(request: Request) -> Response:
        check_model_name(request.path_params["name"], service.name)
        return JSONResponse(_entry(service))

    async def chat(request: Request) -> Response:
        return await service.answer(request, Model.chat)

    async def completions(request: Request) -> Response:
        return await service.answer(request, Model.completion)

    middleware = [Middleware(_Guard, key=api_key)] if api_key else []
    if origins:  # outermost, so that errors can be read there too
        cors: Any = CORSMiddleware
        middleware.insert(
            0, Middleware(cors, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
        )
    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers=_HANDLERS,
    )
    # A redirect would name the scheme and host that a proxy in front hides: perhaps without TLS.
    app.router.redirect_slashes = False
    return app


class _Guard:
    """Asks for the key everywhere but at /health."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            known = hmac.compare_digest(given.strip().encode("latin-1"), self._key)
            if scheme.lower() != "bearer" or not known:
                response = ApiError(
                    401,
                    "the API key is missing or wrong; send Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                ).response()
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _entry(service: Service) -> dict[str, Any]:
    """The model's entry in a list; `max_model_len` is vLLM's name for the context."""
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "dots1-local",
        "max_model_len": service.opened()[0].n_ctx,
    }


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


_HANDLERS: Mapping[Any, Any] = {
    ApiError: _refuse,
    HTTPException: _refuse_path,
    ClientDisconnect: _drop,
    Exception: _fail,
}


BACKLOG = 128  # connections that asyncio accepts at once
IDLE_SECONDS = 60  # clients close idle connections sooner
_MOST, _FEWEST = 1000, 32
_FILES = 2048
_SPARE = 4 * BACKLOG  # file descriptors for connections not yet closed, and everything else


def allow_files() -> None:
    """Raise the process's limit of open files to what its connections need, as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Connection(H11Protocol):
    """One connection; one too many is closed at once.

    uvicorn itself lets a new connection be silent for ever, and a header come byte by byte.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _most():
            transport.abort()
        else:
            self._expect_header()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._expect_header()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _expect_header(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(IDLE_SECONDS, self.timeout_keep_alive_handler)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _most() -> int:
    """How many there may be; out of descriptors, asyncio fails to accept any and fills the log."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if files == resource.RLIM_INFINITY else min(_MOST, max(_FEWEST, files - _SPARE))
