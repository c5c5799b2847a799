"""What the endpoints share: one model, available once it is loaded and until the server ends."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Literal

from starlette.requests import Request

from dots1_local.errors import Dots1Error, UsageError
from dots1_local.serve.generation import Order, QueueFull
from dots1_local.serve.http.answering import PING_SECONDS, Answering, Writer
from dots1_local.serve.http.body import Fields, parse, read
from dots1_local.serve.http.errors import ApiError, invalid
from dots1_local.serve.http.model import Model
from dots1_local.serve.scheduler import Scheduler

__all__ = ["RETRY_SOON", "Service"]

Reader = Callable[[Model, Fields], tuple[list[Order], Writer]]  # reads a body

_READERS = 2  # threads that parse requests and tokenise prompts
RETRY_SOON = {"Retry-After": "5"}  # seconds


class Service:
    """One model under one name; a stream is silent for at most `ping` seconds."""

    def __init__(self, name: str, *, ping: float = PING_SECONDS) -> None:
        self.name, self.created = name, int(time.time())
        self._ping = ping
        self._opened: tuple[Model, Scheduler] | None = None
        self._closing = False
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="dots1-request")

    def open(self, model: Model, scheduler: Scheduler) -> None:
        """Begin to answer requests."""
        self._opened = model, scheduler

    def close(self) -> None:
        """Refuse new requests; those that are being answered go on."""
        self._closing = True

    def join(self) -> None:
        """Wait for requests that are being read, as they use the model's vocabulary."""
        self._readers.shutdown(cancel_futures=True)

    @property
    def status(self) -> Literal["loading", "ok", "closing"]:
        """Where the server is between start and end."""
        return "closing" if self._closing else "ok" if self._opened else "loading"

    @property
    def load(self) -> dict[str, int]:
        """The scheduler's `State` as a document; empty while the model is loading."""
        return asdict(self._opened[1].state) if self._opened else {}

    def opened(self) -> tuple[Model, Scheduler]:
        """The model and the scheduler that answer requests.

        Raises:
            ApiError: the model is loading, or the server is shutting down.
        """
        if self._opened is None or self._closing:
            state = "shutting down" if self._closing else "loading the model"
            raise ApiError(503, f"the server is {state}; try again later", headers=RETRY_SOON)
        return self._opened

    def check_name(self, name: str | None) -> None:
        """Make sure that a request is for this model, or names none.

        Raises:
            ApiError: it is for another.
        """
        if name is not None and name != self.name:
            message = f"there is no model {name!r:.80} here, only {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def answer(self, request: Request, reader: Reader) -> Answering:
        """The response to a request, already submitted to the scheduler.

        Raises:
            ApiError: the request cannot be carried out, or not now.
        """
        self.opened()  # refuses before the body is read
        body = await read(request)
        model, scheduler = self.opened()
        loop = asyncio.get_running_loop()
        orders, writer = await loop.run_in_executor(self._readers, self._read, body, model, reader)
        try:
            return Answering(scheduler, orders, writer, self._ping)
        except QueueFull as error:
            wait = {"Retry-After": str(error.retry_after)}
            raise ApiError(429, str(error), code="queue_full", headers=wait) from None
        except UsageError as error:
            raise invalid(str(error)) from None
        except Dots1Error as error:  # it takes no more
            raise ApiError(503, str(error), headers=RETRY_SOON) from None

    def _read(self, body: bytes, model: Model, reader: Reader) -> tuple[list[Order], Writer]:
        """The orders in a body; runs in a thread, as long prompts take a while to tokenise."""
        try:
            fields = Fields(parse(body))
            self.check_name(fields.text("model"))
            return reader(model, fields)
        except RecursionError:
            raise invalid("the body is nested too deeply") from None
