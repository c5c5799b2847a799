"""An answer on its way to the client, whole or as a stream, cancelled when the client leaves."""

import asyncio
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from dots1_local.serve.generation import Event, Failed, Finished, Order, Piece
from dots1_local.serve.http.errors import ApiError
from dots1_local.serve.http.writer import Collected, Document, Writer
from dots1_local.serve.scheduler import Scheduler

__all__ = ["PING_SECONDS", "Answering"]

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
