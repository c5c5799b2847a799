"""The server with a model that says what a test wants, in place of the scheduler and the engine."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from dots1_local.devices.machine import find_hardware
from dots1_local.engine.engine import Engine
from dots1_local.engine.log import Allocated
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.footprint import footprint
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.planner import place
from dots1_local.serve.generation import Finished, GenerationRequest, Piece, RequestHandle
from dots1_local.serve.http.app import make_app
from dots1_local.serve.http.model import Model
from dots1_local.serve.http.service import Service
from dots1_local.serve.placement_report import placement_report
from dots1_local.serve.run import bind
from dots1_local.serve.scheduler import Load, SlotState
from tools.make_gguf import write_gguf
from tools.make_wide import published_config

__all__ = ["ScriptedScheduler", "full_size_placement", "run_app", "scripted_app"]


@dataclass
class ScriptedScheduler:
    """Answers with the next of `answers`, each a list of pieces, one every `pause` seconds.

    After the pieces an answer waits for `go_on`, which a test may clear.
    """

    answers: list[Sequence[str]] = field(default_factory=list)
    pause: float = 0.0
    go_on: Event = field(default_factory=Event)
    cached: int = 0
    handles: list[RequestHandle] = field(default_factory=list)
    load: Load = Load(0, 0, 1)  # noqa: RUF009 -- it is frozen
    slots: Sequence[SlotState] = (SlotState(0, 0),)
    cache: Any = field(  # its use by the server's metrics
        default_factory=lambda: SimpleNamespace(ram_used=0, disk_used=0, restored_tokens=0)
    )

    def __post_init__(self) -> None:
        self.go_on.set()

    def submit(self, requests: Sequence[GenerationRequest], deliver: Any) -> RequestHandle:
        self.handles.append(RequestHandle(deliver))
        pieces = self.answers.pop(0)
        arguments = (self.handles[-1], pieces, len(requests[0].prompt))
        Thread(target=self._speak, args=arguments, daemon=True).start()
        return self.handles[-1]

    def _speak(self, handle: RequestHandle, pieces: Sequence[str], prompt: int) -> None:
        for piece in pieces:
            if handle.done:
                return
            handle.deliver(Piece(0, piece))
            if self.pause:
                time.sleep(self.pause)
        self.go_on.wait()
        handle.deliver(Finished(0, "stop", prompt, min(self.cached, prompt), len(pieces)))


def scripted_app(
    engine: Engine,
    scheduler: Any,
    placement: dict[str, Any] | None = None,
    name: str = "dots1",
    **options: Any,
) -> ASGIApp:
    """Return the server's application; `options` are those of `make_app`."""
    service = Service(name)
    service.open(Model(engine, name), scheduler, placement)
    return make_app(service, **options)


@contextmanager
def run_app(app: ASGIApp) -> Iterator[str]:
    """Serve an application in a thread, and yield its address, which ends with a slash."""
    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(
        app, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def full_size_placement(folder: Path, machine: str, recipe: str = "DQ3") -> dict[str, Any]:
    """Return the placement of the real model's 62 layers on a described machine.

    The engine is taken to have allocated what was planned, and 1% more for computing.
    """
    path = folder / f"dots.llm1-{recipe}.gguf"
    write_gguf(path, published_config(), recipe, importance=False, headers_only=True)
    hardware, gguf = find_hardware(machine), GGUFFile.open(path)
    graph, placement = ModelGraph.read(gguf), place(gguf, hardware)
    usage = footprint(graph, placement)
    report = {
        name: Allocated(used.weights, used.kv, round(used.compute * 1.01))
        for name, used in usage.items()
    }
    return placement_report(graph, hardware, placement, usage, report)
