"""An ASGI client, and a scheduler that a test controls."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dots1_local.engine.engine import Engine
from dots1_local.serve.generation import Event, GenerationRequest
from dots1_local.serve.http.app import make_app
from dots1_local.serve.http.model import Model
from dots1_local.serve.http.service import Service
from dots1_local.serve.scheduler import Load

Deliver = Callable[[Event], None]


@dataclass
class FakeHandle:
    """A handle that records its cancellation."""

    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def cancel(self) -> None:
        self.cancelled.set()


@dataclass
class CacheUse:
    """What earlier prompts take."""

    ram_used: int = 4096
    disk_used: int = 8192
    restored_tokens: int = 64


@dataclass
class FakeScheduler:
    """Keeps requests and calls `script` with them, which delivers events or raises."""

    script: Callable[[Sequence[GenerationRequest], Deliver], None] = lambda requests, deliver: None
    requests: list[GenerationRequest] = field(default_factory=list)
    handle: FakeHandle = field(default_factory=FakeHandle)
    load: Load = Load(0, 0, 1)  # noqa: RUF009 -- it is frozen
    cache: CacheUse = field(default_factory=CacheUse)

    def submit(self, requests: Sequence[GenerationRequest], deliver: Deliver) -> FakeHandle:
        self.requests = list(requests)
        self.script(requests, deliver)
        return self.handle


def serving(engine: Engine, scheduler: Any, ping: float = 60, **options: Any) -> Any:
    """Return the application with this scheduler; `options` are those of `make_app`."""
    service = Service("dots1", ping=ping)
    service.open(Model(engine, "dots1"), scheduler)
    return make_app(service, **options)


@dataclass
class Reply:
    """A complete response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[str]:
        """The data of each event of a stream."""
        parts = self.body.decode().split("\n\n")
        return [part.removeprefix("data: ") for part in parts if part.startswith("data: ")]


class Exchange:
    """One request; `leave` disconnects the client, and `sent` holds the server's messages."""

    def __init__(
        self,
        app: Any,
        method: str,
        path: str,
        parts: AsyncIterator[bytes],
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._parts, self._left = parts, asyncio.Event()
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self.sent.put))

    def leave(self) -> None:
        self._left.set()

    async def reply(self) -> Reply:
        """Wait for the whole response."""
        await self.task
        start, *rest = [self.sent.get_nowait() for _ in range(self.sent.qsize())]
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return Reply(start["status"], headers, b"".join(each.get("body", b"") for each in rest))

    async def _receive(self) -> dict[str, Any]:
        async for part in self._parts:
            return {"type": "http.request", "body": part, "more_body": True}
        if not self._left.is_set() and not hasattr(self, "_ended"):
            self._ended = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}


JSON = (("Content-Type", "application/json"),)


async def send(
    app: Any, path: str, body: Any = None, headers: Sequence[tuple[str, str]] = JSON
) -> Reply:
    """Send a request and wait for its response: a GET, or a POST if there is a body."""
    return await exchange(app, path, body, headers).reply()


def exchange(
    app: Any, path: str, body: Any = None, headers: Sequence[tuple[str, str]] = JSON
) -> Exchange:
    """Begin a request; the body is bytes or becomes JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Exchange(app, "GET" if body is None else "POST", path, _parts(data), headers)


async def _parts(data: bytes) -> AsyncIterator[bytes]:
    yield data
