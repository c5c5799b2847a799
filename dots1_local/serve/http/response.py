"""Responses of both endpoints, whole or streamed, and cancelled when the client disconnects."""

import asyncio
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, ClassVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from dots1_local.serve.generation import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Piece,
    Progress,
    Scored,
)
from dots1_local.serve.http.request import ApiError
from dots1_local.serve.http.shared_fields import Options
from dots1_local.serve.http.timings import prompt_progress, timings
from dots1_local.serve.scheduler import Scheduler

__all__ = [
    "PING_SECONDS", "Document", "GenerationResponse", "OpenAIWriter", "Writer", "named_logprob",
]  # fmt: skip

PING_SECONDS = 5.0  # proxies and clients give up on streams that are silent for a minute or so
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_MIN_LOGPROB = -9999.0  # OpenAI's value for minus infinity, which JSON cannot express

Document = dict[str, Any]  # a JSON object to send


class Writer(ABC):
    """Writes the JSON of one response, in chunks or whole."""

    ping = b": still at work\n\n"  # a comment, which clients of server-sent events skip
    last = b""  # what ends a stream

    def __init__(self, options: Options, n_choices: int) -> None:
        self.options, self.n_choices = options, n_choices

    @abstractmethod
    def begin(self) -> list[Document]:
        """Return the chunks before any text."""

    def progress(self, progress: Progress) -> list[Document]:
        """Return the chunks that tell how far a prompt is."""
        return []

    def scored(self, scored: Scored) -> list[Document]:
        """Return the chunks for a prompt's logprobs, and keep what `whole` needs of them."""
        return []

    @abstractmethod
    def piece(self, piece: Piece) -> list[Document]:
        """Return the chunks for a piece of text."""

    @abstractmethod
    def finish(self, finished: Finished) -> list[Document]:
        """Return the chunks that end a choice."""

    @abstractmethod
    def end(self, finished: Sequence[Finished]) -> list[Document]:
        """Return the chunks after all choices."""

    @abstractmethod
    def whole(self, choices: Sequence[tuple[Piece, Finished]]) -> Document:
        """Return the whole response; the `Piece` of a choice is all of its text."""

    def failure(self, error: ApiError) -> Document:
        """Return the chunk that ends a stream whose generation failed."""
        return error.body

    def frame(self, document: Document) -> str:
        """Return a chunk as a server-sent event, in one line of ASCII.

        Some clients take U+2028 and similar characters for the end of a line.
        """
        return f"data: {json.dumps(document, separators=(',', ':'))}\n\n"


class OpenAIWriter(Writer):
    """Writes choices in a frame that OpenAI's older endpoints share."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    no_text: ClassVar[Document]  # the fields of a choice in a chunk without text
    last = b"data: [DONE]\n\n"

    def __init__(self, model: str, options: Options, n_choices: int) -> None:
        super().__init__(options, n_choices)
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": model,
        }

    def progress(self, progress: Progress) -> list[Document]:
        chunk = self._chunk(progress.index, **self.no_text)
        return [chunk | {"prompt_progress": prompt_progress(progress)}]

    def end(self, finished: Sequence[Finished]) -> list[Document]:
        if not self.options.include_usage:
            return []
        chunk = {**self._head, "object": self.chunk_kind, "choices": []}
        return [{**chunk, "usage": self._usage(finished), "timings": timings(finished)}]

    def whole(self, choices: Sequence[tuple[Piece, Finished]]) -> Document:
        return {
            **self._head,
            "object": self.kind,
            "choices": [self._choice(piece, finished) for piece, finished in choices],
            "usage": self._usage([finished for _, finished in choices]),
            "timings": timings([finished for _, finished in choices]),
        }

    @abstractmethod
    def _choice(self, piece: Piece, finished: Finished) -> Document: ...

    def _chunk(self, index: int, reason: str | None = None, **fields: Any) -> Document:
        choice = {"index": index, **fields, "finish_reason": reason}
        usage = {"usage": None} if self.options.include_usage else {}
        return {**self._head, "object": self.chunk_kind, "choices": [choice], **usage}

    def _last_chunk(self, finished: Finished, reason: str) -> Document:
        """Return the chunk that ends a choice, with its timings if it ends the stream too."""
        chunk = self._chunk(finished.index, reason, **self.no_text)
        return chunk if self.options.include_usage else chunk | {"timings": timings([finished])}

    def _usage(self, finished: Sequence[Finished]) -> Document:
        """Return token counts; a prompt counts once, however many choices it has."""
        firsts = [each for each in finished if each.index % self.options.n == 0]
        prompt = sum(each.prompt_tokens for each in firsts)
        completion = sum(each.completion_tokens for each in finished)
        cached = sum(each.cached_tokens for each in firsts)
        drafted = sum(each.drafted_tokens for each in finished)
        accepted = sum(each.accepted_tokens for each in finished)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            },
        }


def named_logprob(piece: bytes, logprob: float) -> tuple[str, float]:
    """Return a token's text and log-probability as JSON can express them.

    Bytes that are not a whole character become \\x escapes.
    """
    return piece.decode("utf-8", errors="backslashreplace"), max(logprob, _MIN_LOGPROB)


class GenerationResponse(Response):
    """Submits a request to the scheduler, whose errors it raises, and sends what is generated."""

    media_type = "text/event-stream"

    def __init__(
        self,
        scheduler: Scheduler,
        requests: Sequence[GenerationRequest],
        writer: Writer,
        ping: float,
        observe: Callable[[Event], None],
    ) -> None:
        """`observe` is called with each event, in the engine's thread."""
        super().__init__(headers=_STREAM_HEADERS)
        del self.headers["content-length"]  # unknown at the start of a stream
        self._writer, self._ping = writer, ping
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def receive(event: Event) -> None:  # runs in the engine's thread
            observe(event)
            with suppress(RuntimeError):  # the loop may have ended
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._handle = scheduler.submit(requests, receive)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = self._writer.options.stream
        answer = self._stream(send) if stream else self._whole(scope, receive, send)
        tasks = [asyncio.create_task(answer), asyncio.create_task(_disconnected(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._handle.cancel()
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces: list[list[Piece]] = [[] for _ in range(self._writer.n_choices)]
        finished: dict[int, Finished] = {}
        while len(finished) < len(pieces):
            event = await self._events.get()
            if isinstance(event, Failed):
                raise ApiError(500, event.message)
            if isinstance(event, Piece):
                pieces[event.index].append(event)
            elif isinstance(event, Scored):
                self._writer.scored(event)
            elif isinstance(event, Finished):
                finished[event.index] = event
        choices = [(_joined(index, each), finished[index]) for index, each in enumerate(pieces)]
        await JSONResponse(self._writer.whole(choices))(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._send_documents(send, self._writer.begin())
        finished: list[Finished] = []
        failed = False
        while not failed and len(finished) < self._writer.n_choices:
            events = await self._next(send)
            await self._send_documents(send, chain.from_iterable(map(self._documents, events)))
            finished += [event for event in events if isinstance(event, Finished)]
            failed = isinstance(events[-1], Failed)
        if not failed:
            await self._send_documents(send, self._writer.end(finished))
            await _send(send, self._writer.last)
        await send({"type": "http.response.body"})

    async def _send_documents(self, send: Send, documents: Iterable[Document]) -> None:
        await _send(send, "".join(map(self._writer.frame, documents)).encode())

    def _documents(self, event: Event) -> list[Document]:
        if isinstance(event, Failed):
            return [self._writer.failure(ApiError(500, event.message))]
        if isinstance(event, Scored):
            return self._writer.scored(event)
        if isinstance(event, Progress):
            return self._writer.progress(event)
        return self._writer.piece(event) if isinstance(event, Piece) else self._writer.finish(event)

    async def _next(self, send: Send) -> list[Event]:
        """Return the events that have come; until one comes, comments keep the stream alive."""
        while True:
            try:
                async with asyncio.timeout(self._ping):
                    first = await self._events.get()
            except TimeoutError:
                await _send(send, self._writer.ping)
            else:
                return [first, *(self._events.get_nowait() for _ in range(self._events.qsize()))]


def _joined(index: int, pieces: Sequence[Piece]) -> Piece:
    logprobs = chain.from_iterable(piece.logprobs for piece in pieces)
    return Piece(index, "".join(piece.text for piece in pieces), tuple(logprobs))


async def _send(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
