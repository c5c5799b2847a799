"""Schedulers on models of milliseconds, what they tell, and what they compute."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event as Flag
from threading import Semaphore
from typing import Any, Self

import numpy as np
from llama_cpp import llama_cpp as llama
from numpy.typing import NDArray

from dots1_local.chat.sampling import Sampling
from dots1_local.engine.engine import Engine, Entry
from dots1_local.serve.generation import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Piece,
    TokenLogprob,
)
from dots1_local.serve.scheduler import Scheduler

GREEDY = Sampling(temperature=0)
PATIENCE = 60  # seconds; only a broken scheduler needs them


def greedy(prompt: str | Sequence[int], **options: Any) -> GenerationRequest:
    """One that takes the likeliest tokens."""
    tokens = prompt.encode() if isinstance(prompt, str) else prompt
    return GenerationRequest(tuple(tokens), **{"sampling": GREEDY, **options})


class Listener:
    """What a request is told."""

    def __init__(self, choices: int = 1) -> None:
        self.events: list[Event] = []
        self._left = choices
        self._over, self._begun = Flag(), Flag()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._left -= isinstance(event, Finished)
        self._begun.set()
        if isinstance(event, Failed) or not self._left:
            self._over.set()

    def wait(self) -> Self:
        """Until its last event."""
        assert self._over.wait(PATIENCE), f"after {self.events[-3:]} nothing came"
        return self

    def wait_for_the_first(self) -> None:
        assert self._begun.wait(PATIENCE), "nothing came"

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
    """Where ubatches wait to be let by."""

    def __init__(self) -> None:
        self.arrived, self.allowed = Semaphore(0), Semaphore(0)


class RecordingScheduler(Scheduler):
    """A scheduler whose ubatches are recorded, and pass one at a time once `hold` was called."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        self.ubatches: list[list[Entry]] = []
        self._gate: Gate | None = None
        self._submit = engine.submit
        engine.submit = self._recorded  # type: ignore[method-assign]
        super().__init__(engine, **options)

    def ask(self, *orders: GenerationRequest) -> Listener:
        listener = Listener(len(orders))
        self.submit(orders, listener)
        return listener

    @property
    def computed(self) -> int:
        """Tokens, since the last `ubatches.clear()`."""
        return sum(map(len, self.ubatches))

    def hold(self) -> None:
        self._gate = Gate()

    def next_ubatch(self) -> list[Entry]:
        """Wait until one is about to be computed, which then it is not yet."""
        assert self._gate
        assert self._gate.arrived.acquire(timeout=PATIENCE), "no ubatch came"
        return self.ubatches[-1]

    def go_on(self) -> None:
        """Let the one that is held by."""
        assert self._gate
        self._gate.allowed.release()

    def release(self) -> None:
        """Hold no more."""
        if self._gate:
            gate, self._gate = self._gate, None
            gate.allowed.release(1 << 20)

    def _recorded(self, entries: Sequence[Entry]) -> NDArray[np.float32]:
        gate = self._gate
        self._check_cache()
        self.ubatches.append(list(entries))
        if gate:
            gate.arrived.release()
            assert gate.allowed.acquire(timeout=PATIENCE)
        return self._submit(entries)

    def _check_cache(self) -> None:
        """The engine holds of each sequence as many tokens as the scheduler believes."""
        memory = llama.llama_get_memory(self._engine.context)
        for slot in self._slots._slots:
            last = llama.llama_memory_seq_pos_max(memory, slot.seq_id)
            assert last == len(slot.tokens) - 1


@contextmanager
def open_scheduler(
    model: Path, slots: int = 2, *, n_ctx: int = 256, n_ubatch: int = 64, **options: Any
) -> Iterator[RecordingScheduler]:
    with open_engine(model, n_ctx, n_ubatch, n_sequences=slots, shared_cache=True) as engine:
        scheduler = RecordingScheduler(engine, **options)
        try:
            yield scheduler
        finally:
            scheduler.release()
            scheduler.close(0)


def open_engine(model: Path, n_ctx: int, n_ubatch: int, **options: Any) -> Engine:
    return Engine.open(
        model,
        n_ctx=n_ctx,
        n_ubatch=n_ubatch,
        kv_type="F32",
        flash_attention=False,
        threads=1,
        **options,
    )


class Alone:
    """The same model with nothing beside: whether it would have written that too."""

    def __init__(self, model: Path) -> None:
        self._model = model

    def check(self, prompt: Sequence[int], written: Sequence[TokenLogprob]) -> None:
        """Each token was the likeliest, or a hair's breadth from it, and as likely as was said."""
        tokens = [*prompt, *(each.token for each in written)]
        with open_engine(self._model, 1024, 1024, all_logits=True) as engine:
            [rows] = engine.decode_all(tokens[:-1], 0)
            logprobs = log_softmax(rows)[len(prompt) - 1 :]
        assert len(logprobs) == len(written)
        for row, each in zip(logprobs, written, strict=True):
            assert row[each.token] > row.max() - 1e-3
            assert abs(row[each.token] - each.logprob) < 1e-3


def log_softmax(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = rows.astype(np.float64)
    logs: NDArray[np.float64] = exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    return logs
