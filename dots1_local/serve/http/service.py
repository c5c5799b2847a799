"""The endpoints of OpenAI's API for one model, once it is loaded and until the server ends."""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dots1_local.errors import Dots1Error, UsageError
from dots1_local.serve.generation import GenerationRequest, QueueFull
from dots1_local.serve.http.metrics import CONTENT_TYPE, Metrics
from dots1_local.serve.http.model import Model
from dots1_local.serve.http.request import (
    ApiError,
    check_model_name,
    invalid,
    parse_body,
    read_body,
)
from dots1_local.serve.http.response import PING_SECONDS, GenerationResponse, Writer
from dots1_local.serve.scheduler import Scheduler

__all__ = ["Service"]

_RETRY_SOON = {"Retry-After": "5"}  # seconds
_T = TypeVar("_T")
_READERS = 2  # threads that parse requests and tokenise prompts


# Reads a parsed body.
Reader = Callable[[Model, dict[str, Any]], tuple[list[GenerationRequest], Writer]]


class Service:
    """One model under one name; a stream is silent for at most `ping` seconds."""

    def __init__(self, name: str, *, ping: float = PING_SECONDS) -> None:
        self.name, self._created = name, int(time.time())
        self._ping = ping
        self._opened: tuple[Model, Scheduler] | None = None
        self._placement: Mapping[str, Any] | None = None
        self._closing = False
        self._metrics = Metrics(lambda: self._opened[1] if self._opened else None)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="dots1-request")

    def open(
        self, model: Model, scheduler: Scheduler, placement: Mapping[str, Any] | None = None
    ) -> None:
        """Begin to answer requests; `placement` is what GET /v1/placement answers."""
        self._placement = placement
        self._opened = model, scheduler

    def close(self) -> None:
        """Refuse new requests; running answers continue."""
        self._closing = True

    def join(self) -> None:
        """Wait until no thread reads a request: reading uses the model's vocabulary."""
        self._readers.shutdown(cancel_futures=True)

    async def health(self, request: Request) -> Response:
        """Report the stage of the server and the scheduler's load."""
        status = "closing" if self._closing else "ok" if self._opened else "loading"
        document = {"status": status, **(asdict(self._opened[1].load) if self._opened else {})}
        if status == "ok":
            return JSONResponse(document)
        return JSONResponse(document, 503, _RETRY_SOON)

    async def metrics(self, request: Request) -> Response:
        """Report counters, times and the load, for Prometheus."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def slots(self, request: Request) -> Response:
        """Report what each slot does and holds."""
        return JSONResponse([asdict(each) for each in self._available()[1].slots])

    async def placement(self, request: Request) -> Response:
        """Report which device holds what."""
        self._available()
        if self._placement is None:
            raise ApiError(404, "the engine's devices could not be asked where the model is")
        return JSONResponse(self._placement)

    async def models(self, request: Request) -> Response:
        """List the one model."""
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def model(self, request: Request) -> Response:
        """Describe the model."""
        check_model_name(request.path_params["name"], self.name)
        return JSONResponse(self._entry())

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, Model.chat)

    async def completions(self, request: Request) -> Response:
        """Continue texts."""
        return await self._answer(request, Model.completion)

    async def responses(self, request: Request) -> Response:
        """Answer a conversation, in the form of OpenAI's Responses API."""
        return await self._answer(request, Model.responses)

    async def messages(self, request: Request) -> Response:
        """Answer a conversation, in the form of Anthropic's Messages API."""
        return await self._answer(request, Model.messages)

    async def count_tokens(self, request: Request) -> Response:
        """Count the tokens of a conversation."""
        return await self._compute(request, Model.count_tokens)

    async def tokenize(self, request: Request) -> Response:
        """Return the tokens of a text or a conversation."""
        return await self._compute(request, Model.tokenize)

    async def detokenize(self, request: Request) -> Response:
        """Return the text of tokens."""
        return await self._compute(request, Model.detokenize)

    async def tokenizer_info(self, request: Request) -> Response:
        """Describe the special tokens and the chat template."""
        return JSONResponse(self._available()[0].tokenizer_info())

    async def props(self, request: Request) -> Response:
        """Describe the model and its default settings, as llama-server does."""
        return JSONResponse(self._available()[0].props())

    def _entry(self) -> dict[str, Any]:
        """Return the model's entry in the list.

        `max_model_len` is vLLM's name for the context's length, and `meta` is llama-server's.
        """
        model = self._available()[0]
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "dots1-local",
            "max_model_len": model.n_ctx,
            "meta": model.meta,
        }

    def _available(self) -> tuple[Model, Scheduler]:
        """Return the model and its scheduler, or refuse while loading or shutting down."""
        if self._opened is None or self._closing:
            state = "shutting down" if self._closing else "loading the model"
            raise ApiError(503, f"the server is {state}; try again later", headers=_RETRY_SOON)
        return self._opened

    async def _compute(
        self, request: Request, compute: Callable[[Model, dict[str, Any]], dict[str, Any]]
    ) -> Response:
        """Answer a body without the scheduler."""
        document, _ = await self._read(request, compute)
        return JSONResponse(document)

    async def _answer(self, request: Request, reader: Reader) -> Response:
        """Submit a request to the scheduler and return its response."""
        (requests, writer), scheduler = await self._read(request, reader)
        try:
            observe = self._metrics.observer()
            return GenerationResponse(scheduler, requests, writer, self._ping, observe)
        except QueueFull as error:
            wait = {"Retry-After": str(error.retry_after)}
            raise ApiError(429, str(error), code="queue_full", headers=wait) from None
        except UsageError as error:
            raise invalid(str(error)) from None
        except Dots1Error as error:  # the scheduler is closed
            raise ApiError(503, str(error), headers=_RETRY_SOON) from None

    async def _read(
        self, request: Request, reader: Callable[[Model, dict[str, Any]], _T]
    ) -> tuple[_T, Scheduler]:
        """Read a body in a thread of its own, because long prompts take a while to tokenise."""
        self._available()  # refuse before the body is read
        body = await read_body(request)
        model, scheduler = self._available()
        loop = asyncio.get_running_loop()
        read = loop.run_in_executor(self._readers, self._parsed, body, model, reader)
        return await read, scheduler

    def _parsed(
        self, body: bytes, model: Model, reader: Callable[[Model, dict[str, Any]], _T]
    ) -> _T:
        try:
            raw = parse_body(body)
            check_model_name(raw.get("model"), self.name)
            return reader(model, raw)
        except RecursionError:
            raise invalid("the body is nested too deeply") from None
