"""The ASGI application: endpoints, the API key, errors, and limits on connections."""

import asyncio
import hmac
import logging
import resource
from collections.abc import Sequence, Set
from contextlib import suppress
from typing import Any

import h11
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dots1_local.serve.http.openapi import openapi
from dots1_local.serve.http.page import page_routes
from dots1_local.serve.http.paths import CanonicalPath
from dots1_local.serve.http.request import ApiError, invalid
from dots1_local.serve.http.service import Service

__all__ = ["BACKLOG", "IDLE_SECONDS", "Connection", "make_app", "raise_file_limit"]

BACKLOG = 128  # connections that asyncio accepts at once
IDLE_SECONDS = 60  # for a request's header to arrive; clients close idle connections sooner
_MAX_CONNECTIONS, _MIN_CONNECTIONS = 1000, 32
_MAX_FILES = 2048
_HEALTH = "/health"
_CLOSE = (b"connection", b"close")
_OTHER_FILES = 4 * BACKLOG  # file descriptors of connections not yet closed and everything else


def make_app(
    service: Service,
    *,
    api_key: str | None = None,
    origins: Sequence[str] = (),
    page: bool = True,
) -> Starlette:
    """Return the ASGI application, with the chat page at / if `page`.

    Web pages from `origins` may use it too, "*" allows any.
    """
    routes = _routes(service, bool(api_key))
    pages = page_routes() if page else []
    keyless = {_HEALTH, *(route.path for route in pages)}
    middleware = [Middleware(CanonicalPath, paths=[route.path for route in routes])]
    if api_key:
        middleware.append(Middleware(_Guard, key=api_key, keyless=keyless))
    if origins:  # outermost, so that web pages can read errors too
        cors: Any = CORSMiddleware
        middleware.insert(
            0, Middleware(cors, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
        )
    app = Starlette(
        routes=[*routes, *pages],
        middleware=middleware,
        exception_handlers={HTTPException: _refuse, Exception: _report_bug},
    )
    # A redirect would name this server's scheme and host, not those of a proxy in front of it.
    app.router.redirect_slashes = False
    return app


def _routes(service: Service, has_key: bool) -> list[Route]:
    """Return the API's routes, of which the last describes all."""

    async def describe(request: Request) -> Response:
        """Describe the endpoints."""
        return JSONResponse(openapi(routes, keyless={_HEALTH} if has_key else None))

    routes = [
        Route(_HEALTH, service.health),
        Route("/metrics", service.metrics),
        Route("/slots", service.slots),
        Route("/props", service.props),
        Route("/v1/placement", service.placement),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.model),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/responses", service.responses, methods=["POST"]),
        Route("/v1/messages", service.messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", service.count_tokens, methods=["POST"]),
        Route("/tokenize", service.tokenize, methods=["POST"]),
        Route("/detokenize", service.detokenize, methods=["POST"]),
        Route("/tokenizer_info", service.tokenizer_info),
        Route("/openapi.json", describe),
    ]
    return routes


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response(request.url.path)
    path = f"{request.url.path:.80}"
    message = (
        f"there is no {path} here; use /v1/chat/completions, /v1/responses, /v1/messages, "
        "/v1/completions or /v1/models"
    )
    if error.status_code == 405:
        message = f"{path} does not support {request.method}"
    return ApiError(error.status_code, message, headers=error.headers).response(path)


async def _report_bug(request: Request, error: Exception) -> Response:
    logging.getLogger(__name__).error("%s failed", request.url.path, exc_info=error)
    told = ApiError(500, "something went wrong in the server; its log says what")
    return told.response(request.url.path)


class _Guard:
    """Requires the API key everywhere but at the `keyless` paths."""

    def __init__(self, app: ASGIApp, key: str, keyless: Set[str]) -> None:
        self._app, self._key, self._keyless = app, key.encode(), keyless

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._keyless:
            headers = Headers(scope=scope)
            scheme, _, bearer = headers.get("authorization", "").partition(" ")
            # Some clients send an empty x-api-key beside the bearer's.
            given = headers.get("x-api-key") or (bearer if scheme.lower() == "bearer" else "")
            if not hmac.compare_digest(given.strip().encode("latin-1"), self._key):
                message = "the API key is missing or wrong; send Authorization: Bearer KEY"
                scheme_asked = {"WWW-Authenticate": "Bearer"}
                error = ApiError(401, message, code="invalid_api_key", headers=scheme_asked)
                await error.response(scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def raise_file_limit() -> None:
    """Raise the process's limit of open files to what its connections need, if allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(_MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Connection(H11Protocol):
    """One connection; it is closed at once if there are too many, or later if it stays silent.

    uvicorn itself allows a new connection to be silent for ever, and a header to arrive slowly.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _max_connections():
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

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in the shape of the API, unless an answer has begun."""
        begun = self.cycle and not self.cycle.response_complete
        path = self.cycle.scope["path"] if begun else ""
        refusal = invalid("the request is not HTTP/1.1, or its head is too long").response(path)
        headers = [*self.server_state.default_headers, *refusal.raw_headers, _CLOSE]
        with suppress(h11.LocalProtocolError):
            for event in (
                h11.Response(status_code=400, headers=headers, reason="Bad Request"),
                h11.Data(data=bytes(refusal.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_header(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(IDLE_SECONDS, self.timeout_keep_alive_handler)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _max_connections() -> int:
    """Return the limit; without free file descriptors, asyncio would only fill the log."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    return min(_MAX_CONNECTIONS, max(_MIN_CONNECTIONS, files - _OTHER_FILES))
