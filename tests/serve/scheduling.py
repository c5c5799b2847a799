"""Schedulers on tiny models, the events they deliver, and the ubatches they compute."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event as Flag
from threading import Semaphore
from typing import Any, Self

import numpy as np
from llama_cpp import llama_cpp as llama
from numpy.typing import NDArray

from dots1_local.chat.kv_state import kv_binding
from dots1_local.chat.sampling import Sampling
from dots1_local.engine.engine import Engine, Entry
from dots1_local.serve.disk_cache import DiskCache
from dots1_local.serve.generation import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Piece,
    TokenLogprob,
)
from dots1_local.serve.prompt_cache import PromptCache
from dots1_local.serve.scheduler import Scheduler
from tests.helpers import all_logits

GREEDY = Sampling(temperature=0)
TIMEOUT = 60  # seconds; only a broken scheduler needs so long


def greedy(prompt: str | Sequence[int], **options: Any) -> GenerationRequest:
    """A request that always takes the likeliest token."""
    tokens = prompt.encode() if isinstance(prompt, str) else prompt
    return GenerationRequest(tuple(tokens), **{"sampling": GREEDY, **options})


class Listener:
    """Collects the events of a request."""

    def __init__(self, choices: int = 1) -> None:
        self.events: list[Event] = []
        self._left = choices
        self._ended, self._begun = Flag(), Flag()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._left -= isinstance(event, Finished)
        self._begun.set()
        if isinstance(event, Failed) or not self._left:
            self._ended.set()

    def wait(self) -> Self:
        """Wait for the last event."""
        assert self._ended.wait(TIMEOUT), f"after {self.events[-3:]} nothing came"
        return self

    def wait_for_first(self) -> None:
        assert self._begun.wait(TIMEOUT), "nothing came"

    def text(self, index: int = 0) -> str:
        return "".join(piece.text for piece in self._pieces(index))

    def logprobs(self, index: int = 0) -> list[TokenLogprob]:
        return [each for piece in self._pieces(index) for each in piece.logprobs]

    def finished(self, index: int = 0) -> Finished:
        [event] = [e for e in self.events if isinstance(e, Finished) and e.index == index]
        return event

    @property
    def failure(self) -> str:
        event = self.events[-1]
        assert isinstance(event, Failed)
        return event.message

    def _pieces(self, index: int) -> list[Piece]:
        return [e for e in self.events if isinstance(e, Piece) and e.index == index]


class Gate:
    """Holds ubatches until they are released."""

    def __init__(self) -> None:
        self.arrived, self.allowed = Semaphore(0), Semaphore(0)


class RecordingScheduler(Scheduler):
    """A scheduler that records its ubatches; after `hold` they are computed one at a time."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        self.ubatches: list[list[Entry]] = []
        self._gate: Gate | None = None
        self.engine, self.engine_submit = engine, engine.submit
        engine.submit = self._recorded  # type: ignore[method-assign]
        super().__init__(engine, **options)

    def ask(self, *requests: GenerationRequest) -> Listener:
        listener = Listener(len(requests))
        self.submit(requests, listener)
        return listener

    @property
    def computed(self) -> int:
        """How many tokens have been computed since the last `ubatches.clear()`."""
        return sum(map(len, self.ubatches))

    def hold(self) -> None:
        self._gate = Gate()

    def next_ubatch(self) -> list[Entry]:
        """Wait for a ubatch and return it; it has not been computed yet."""
        assert self._gate
        assert self._gate.arrived.acquire(timeout=TIMEOUT), "no ubatch came"
        return self.ubatches[-1]

    def compute(self) -> None:
        """Compute the ubatch that is held."""
        assert self._gate
        self._gate.allowed.release()

    def release(self) -> None:
        """Stop holding ubatches."""
        if self._gate:
            gate, self._gate = self._gate, None
            gate.allowed.release(1 << 20)

    def _recorded(self, entries: Sequence[Entry]) -> NDArray[np.float32]:
        gate = self._gate
        self._check_cache(entries)
        self.ubatches.append(list(entries))
        if gate:
            gate.arrived.release()
            assert gate.allowed.acquire(timeout=TIMEOUT)
        return self.engine_submit(entries)

    def _check_cache(self, entries: Sequence[Entry]) -> None:
        """Check that each sequence continues where its tokens in the engine end."""
        memory = llama.llama_get_memory(self.engine.context)
        for seq_id in {entry.seq_id for entry in entries}:
            first = min(entry.position for entry in entries if entry.seq_id == seq_id)
            assert llama.llama_memory_seq_pos_max(memory, seq_id) == first - 1


@contextmanager
def open_scheduler(
    model: Path,
    slots: int = 2,
    *,
    n_ctx: int = 256,
    n_ubatch: int = 64,
    n_draft: int = 0,
    n_scored: int = 0,
    cache_bytes: int = 0,
    disk: Path | None = None,
    disk_bytes: int = 1 << 30,
    kv_type: str = "F32",
    **options: Any,
) -> Iterator[RecordingScheduler]:
    with open_engine(
        model,
        n_ctx,
        n_ubatch,
        n_sequences=slots,
        shared_cache=True,
        n_draft=n_draft,
        n_scored=n_scored,
        kv_type=kv_type,
    ) as engine:
        files = DiskCache(disk, disk_bytes, kv_binding(engine)) if disk else None
        cache = PromptCache(engine, cache_bytes, files)
        scheduler = RecordingScheduler(engine, **{"draft": n_draft, "cache": cache, **options})
        try:
            yield scheduler
        finally:
            scheduler.release()
            scheduler.close(0)


def open_engine(
    model: Path, n_ctx: int, n_ubatch: int, *, kv_type: str = "F32", **options: Any
) -> Engine:
    return Engine.open(
        model,
        n_ctx=n_ctx,
        n_ubatch=n_ubatch,
        kv_type=kv_type,
        flash_attention=False,
        threads=1,
        **options,
    )


class Alone:
    """The same model with one sequence, to check what parallel answers should be."""

    def __init__(self, model: Path) -> None:
        self._model = model

    def check(self, prompt: Sequence[int], written: Sequence[TokenLogprob]) -> None:
        """Check that each token was (almost) the likeliest, and that its logprob is right."""
        tokens = [*prompt, *(each.token for each in written)]
        with open_engine(self._model, 1024, 1024, all_logits=True) as engine:
            rows = all_logits(engine, tokens[:-1])
            logprobs = log_softmax(rows)[len(prompt) - 1 :]
        assert len(logprobs) == len(written)
        for row, each in zip(logprobs, written, strict=True):
            assert row[each.token] > row.max() - 1e-3
            assert abs(row[each.token] - each.logprob) < 1e-3


def log_softmax(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = rows.astype(np.float64)
    logs: NDArray[np.float64] = exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    return logs
