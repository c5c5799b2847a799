"""What responses of both endpoints have in common: a head, choices, usage.

An answer on its way to the client, whole or as a stream, cancelled when the client leaves.
"""

import asyncio
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from dots1_local.serve.generation import Event, Failed, Finished, Order, Piece, TokenLogprob
from dots1_local.serve.http.request import ApiError, Options
from dots1_local.serve.scheduler import Scheduler

__all__ = [
    "PING_SECONDS",
    "Answering",
    "Collected",
    "Document",
    "Writer",
    "logprob",
    "token_name",
]


Document = dict[str, Any]  # a JSON object that a client is sent

_UNLIKELY = -9999.0  # OpenAI's for minus infinity, which JSON cannot say


@dataclass
class Collected:
    """One choice as far as it is written; `finished` is set at its end."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None

    def add(self, event: Piece | Finished) -> None:
        if isinstance(event, Finished):
            self.finished = event
        else:
            self.text += event.text
            self.logprobs += event.logprobs


class Writer(ABC):
    """Makes the JSON documents of one response, in chunks or whole."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: str, options: Options, choices: int) -> None:
        self.options, self.choices = options, choices
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": model,
        }

    def begin(self) -> list[Document]:
        """The chunks before any text."""
        return []

    @abstractmethod
    def piece(self, piece: Piece) -> list[Document]:
        """The chunks for a piece of text."""

    @abstractmethod
    def finish(self, finished: Finished) -> list[Document]:
        """The chunks that end a choice."""

    def end(self, answers: Sequence[Finished]) -> list[Document]:
        """The chunks after all choices."""
        if not self.options.include_usage:
            return []
        return [
            {**self._head, "object": self.chunk_kind, "choices": [], "usage": self._usage(answers)}
        ]

    def whole(self, answers: Sequence[Collected]) -> Document:
        """All of the response."""
        finished = [answer.finished for answer in answers if answer.finished]
        return {
            **self._head,
            "object": self.kind,
            "choices": [self._choice(index, answer) for index, answer in enumerate(answers)],
            "usage": self._usage(finished),
        }

    @abstractmethod
    def _choice(self, index: int, answer: Collected) -> Document:
        """A choice of a whole response."""

    def _chunk(self, index: int, reason: str | None = None, **fields: Any) -> Document:
        choice = {"index": index, **fields, "finish_reason": reason}
        usage = {"usage": None} if self.options.include_usage else {}
        return {**self._head, "object": self.chunk_kind, "choices": [choice], **usage}

    def _usage(self, answers: Sequence[Finished]) -> Document:
        """Token counts; a prompt counts once, however many choices it has."""
        firsts = [each for each in answers if each.index % self.options.n == 0]
        prompt = sum(each.prompt_tokens for each in firsts)
        completion = sum(each.completion_tokens for each in answers)
        cached = sum(each.cached_tokens for each in firsts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def logprob(value: float) -> float:
    """A log-probability that JSON can hold."""
    return max(value, _UNLIKELY)


def token_name(piece: bytes) -> str:
    """A token's text, with \\x escapes for bytes that make up only part of a character."""
    return piece.decode("utf-8", errors="backslashreplace")


PING_SECONDS = 5.0  # proxies and clients give up on streams that are silent for a minute or so
_PING = b": still at work\n\n"
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Answering(Response):
    """Submits a request's orders to the scheduler, and is the response to it.

    Raises:
        QueueFull: the scheduler's queue is full.
        Dots1Error: the scheduler is closed, or refuses an order.
    """

    media_type = "text/event-stream"

    def __init__(
        self, scheduler: Scheduler, orders: Sequence[Order], writer: Writer, ping: float
    ) -> None:
        super().__init__(headers=_STREAM_HEADERS)
        del self.headers["content-length"]  # not known yet
        self._writer, self._ping = writer, ping
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:  # in the engine's thread
            with suppress(RuntimeError):  # the loop may have ended
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._ticket = scheduler.submit(orders, deliver)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = (
            self._stream(send) if self._writer.options.stream else self._whole(scope, receive, send)
        )
        tasks = [asyncio.create_task(answer), asyncio.create_task(_left(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ticket.cancel()
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(done[0], Exception):
            raise done[0]

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        choices = [Collected() for _ in range(self._writer.choices)]
        while not all(choice.finished for choice in choices):
            event = await self._events.get()
            if isinstance(event, Failed):
                raise ApiError(500, event.message)
            choices[event.index].add(event)
        await JSONResponse(self._writer.whole(choices))(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await _say(send, self._writer.begin())
        finished: list[Finished] = []
        failed = False
        while not failed and len(finished) < self._writer.choices:
            events = await self._next(send)
            await _say(send, chain.from_iterable(map(self._documents, events)))
            finished += [event for event in events if isinstance(event, Finished)]
            failed = isinstance(events[-1], Failed)
        if not failed:
            await _say(send, self._writer.end(finished))
            await _send(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body"})

    def _documents(self, event: Event) -> list[Document]:
        if isinstance(event, Failed):
            return [ApiError(500, event.message).body]
        return self._writer.piece(event) if isinstance(event, Piece) else self._writer.finish(event)

    async def _next(self, send: Send) -> list[Event]:
        """The events that have come; while there are none, comments keep the stream alive."""
        while True:
            try:
                async with asyncio.timeout(self._ping):
                    first = await self._events.get()
            except TimeoutError:
                await _send(send, _PING)
            else:
                return [first, *(self._events.get_nowait() for _ in range(self._events.qsize()))]


async def _say(send: Send, documents: Iterable[Document]) -> None:
    # In ASCII, as some clients take U+2028 and its like for the end of a line.
    lines = [f"data: {json.dumps(document, separators=(',', ':'))}\n\n" for document in documents]
    if lines:
        await _send(send, "".join(lines).encode())


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _left(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
