"""Continuous batching, in the one thread that uses the engine.

Every step computes one ubatch: the last token of each choice that is writing, and beside them parts
of prompts, oldest first. `pace` decides how much of the prompts; `slots` and `choice` see to it
that what prompts have in common is read once.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread

import numpy as np
from numpy.typing import NDArray

from dots1_local.chat.turns import check_stop
from dots1_local.engine.engine import Engine, Entry
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.serve.choice import Choice
from dots1_local.serve.generation import Event, Failed, Order, Ticket
from dots1_local.serve.queue import Pace, Queue, Waiting
from dots1_local.serve.slots import Slots

__all__ = ["Scheduler", "State"]

_SHUTDOWN = "the server is shutting down"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """How many choices have a slot, how many wait for one, and how many slots there are."""

    running: int
    waiting: int
    slots: int


class Scheduler:
    """Carries out orders, first in, first out; nothing else may use the engine until `close`.

    Each of the engine's sequences is a slot for one choice at a time. Where a request has more
    choices than there are slots, they take turns.
    """

    def __init__(
        self, engine: Engine, *, queue_size: int = 64, on_end: Callable[[], None] = lambda: None
    ) -> None:
        """Start the thread, which calls `on_end` last; up to `queue_size` choices may wait.

        Raises:
            UsageError: the engine has several sequences but no shared cache, or a ubatch too small
                for a token of each.
        """
        _check_engine(engine)
        self._engine = engine
        self._slots = Slots(engine)
        self._queue = Queue(queue_size, len(self._slots))
        self._pace = Pace(engine.n_ubatch)
        self._running: list[Choice] = []  # oldest first
        self._on_end = on_end
        self.failed = False  # it ended without being closed
        self._thread = Thread(target=self._run, name="dots1-engine", daemon=True)
        self._thread.start()

    @property
    def state(self) -> State:
        """The load at this moment."""
        running = sum(not choice.ticket.over for choice in list(self._running))
        return State(running, len(self._queue), len(self._slots))

    def submit(self, orders: Sequence[Order], deliver: Callable[[Event], None]) -> Ticket:
        """Queue a request's choices, all or none.

        `deliver` is called with their events in the engine's thread, so it must not block.

        Raises:
            QueueFull: too many are waiting.
            UsageError: an order cannot be carried out.
            Dots1Error: a prompt fills the context, or the scheduler is closed.
        """
        for order in orders:
            _check_order(order, self._engine)
        ticket = Ticket(deliver)
        self._queue.put(ticket, orders, self.state.running)
        return ticket

    def close(self, patience: float) -> None:
        """Refuse new orders, finish what can be in `patience` seconds, and fail the rest.

        Returns when the thread has ended, at most a ubatch later; the engine is free then. It may
        be called again, also with less patience.
        """
        self._queue.close(_SHUTDOWN, patience)
        self._thread.join()

    def _run(self) -> None:
        reason = "the engine has failed and cannot go on"
        try:
            while self._work_to_do():
                try:
                    self._step()
                except Exception as error:
                    self._fail_running(_sentence(error))
                    self._slots.forget()  # their contents are unknown now
            reason = _SHUTDOWN
        except Exception:
            _log.exception("the engine's thread cannot go on")
            self.failed = True
        finally:
            self._end(reason)
            self._on_end()

    def _end(self, reason: str) -> None:
        self._queue.close(reason, 0)
        self._fail_running(reason)
        while waiting := self._queue.pop():
            waiting.ticket.tell(Failed(reason))
        with suppress(Exception):
            self._slots.forget()

    def _work_to_do(self) -> bool:
        for choice in [each for each in self._running if each.ticket.over]:
            self._leave(choice)
        return self._queue.work_to_do(bool(self._running))

    def _step(self) -> None:
        self._admit()
        parts = self._compose()
        if not parts:  # no choice that was admitted could begin
            return
        read = sum(len(entries) for choice, entries in parts if choice.reading)
        start = time.perf_counter()
        rows = iter(self._engine.submit([entry for _, entries in parts for entry in entries]))
        self._pace.measured(read, time.perf_counter() - start)
        place = -1
        for choice, entries in parts:
            choice.computed(entries)
            place += len(entries)
            if entries[-1].logits:
                self._choose(choice, next(rows), place)

    def _admit(self) -> None:
        while self._slots.any_free and (waiting := self._queue.pop()):
            try:
                self._begin(waiting)
            except Exception as error:
                waiting.ticket.tell(Failed(_sentence(error)))

    def _begin(self, waiting: Waiting) -> None:
        soon = self._queue.next_in_line(len(self._slots))
        slot = self._slots.take(waiting.order.prompt, [each.order.prompt for each in soon])
        try:
            choice = Choice(waiting, slot, self._engine)
        except BaseException:
            self._slots.release(slot)
            raise
        choice.follow(self._running)
        self._running.append(choice)

    def _compose(self) -> list[tuple[Choice, list[Entry]]]:
        """The next ubatch: a token of each that writes, then prompts, oldest first, until full."""
        parts = [(choice, choice.entries(1)) for choice in self._running if not choice.reading]
        room = self._engine.n_ubatch - len(parts)
        if parts:
            room = min(room, self._pace.beside)
        for age, choice in enumerate(self._running):
            if room and choice.reading and choice.ready(self._slots, self._running[:age]):
                parts.append((choice, choice.entries(room)))
                room -= len(parts[-1][1])
        return parts

    def _choose(self, choice: Choice, logits: NDArray[np.float32], place: int) -> None:
        if choice.ticket.over:
            return
        try:
            events = list(choice.choose(logits, place))
        except Exception as error:
            self._slots.empty(choice.slot)
            events = [Failed(_sentence(error))]
        if choice.done:  # before the client hears of it, so that its next request finds a slot
            self._queue.turnover.took(time.monotonic() - choice.begun)
            self._leave(choice)
        for event in events:
            choice.ticket.tell(event)

    def _leave(self, choice: Choice) -> None:
        choice.close()
        self._slots.release(choice.slot)
        self._running.remove(choice)

    def _fail_running(self, reason: str) -> None:
        for choice in self._running:
            choice.ticket.tell(Failed(reason))
            choice.close()
        self._running.clear()


def _check_engine(engine: Engine) -> None:
    n_sequences = engine.settings.n_sequences
    if n_sequences > 1 and not engine.settings.shared_cache:
        raise UsageError("open the engine with shared_cache to serve several sequences")
    if engine.n_ubatch < n_sequences:
        raise UsageError(
            f"a ubatch of {engine.n_ubatch} tokens has no room for one of each of {n_sequences} "
            "sequences"
        )


def _check_order(order: Order, engine: Engine) -> None:
    """Refuse what would fail later and take other requests along."""
    if not order.prompt:
        raise UsageError("there is nothing to complete; give the beginning of a text")
    if not all(0 <= token < engine.n_vocab for token in order.prompt):
        raise UsageError(f"a prompt's tokens are numbers from 0 to {engine.n_vocab - 1}")
    if order.max_tokens is not None and order.max_tokens < 1:
        raise UsageError(f"an answer of at most {order.max_tokens} tokens is none; ask for 1")
    check_stop(order.stop)
    if len(order.prompt) >= engine.n_ctx:
        raise Dots1Error(
            f"the prompt is {len(order.prompt):,} tokens long and the context holds "
            f"{engine.n_ctx:,}, an answer included"
        )


def _sentence(error: Exception) -> str:
    """What a client is told of an error: all that it can do something about, but no bugs."""
    if isinstance(error, Dots1Error):
        return str(error)
    _log.error("the engine's thread met a bug", exc_info=error)
    return "something went wrong in the server; its log says what"
