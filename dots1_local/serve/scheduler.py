"""Continuous batching, in the one thread that uses the engine.

Every step computes one ubatch: the last token of each choice that generates, and parts of prompts,
oldest first. `PrefillBudget` limits the prompt tokens, so that choices that generate do not stall.
Only a choice that is alone has drafts, because they would make every step of the others longer.
`slots` and `choice` let prompts share what they have in common, so that it is computed once.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Thread

import numpy as np
from numpy.typing import NDArray

from dots1_local.chat.draft import Draft, DraftPolicy
from dots1_local.chat.turns import check_stop
from dots1_local.engine.engine import Engine, Entry
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.serve.choice import Choice
from dots1_local.serve.generation import (
    Event,
    Failed,
    GenerationRequest,
    Queue,
    QueuedChoice,
    RequestHandle,
)
from dots1_local.serve.prompt_cache import PromptCache
from dots1_local.serve.slots import Slots

__all__ = ["Load", "PrefillBudget", "Scheduler", "SlotState"]

_SHUTDOWN = "the server is shutting down"
_LAST_STEP = 5.0  # seconds for the step that is being computed when the scheduler is closed
_STEP_SECONDS = 1.0  # for a step while a choice waits for its next token
_MIN_PREFILL = 32  # tokens; a step with fewer is hardly faster, as it reads the experts anyway
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Load:
    """How many choices have a slot, how many wait for one, and how many slots there are."""

    running: int
    waiting: int
    slots: int


@dataclass(frozen=True)
class SlotState:
    """A slot: the tokens in its part of the KV cache, and how far its choice is, if it has one."""

    id: int
    cached_tokens: int
    busy: bool = False
    prompt_tokens: int = 0
    generated_tokens: int = 0


class PrefillBudget:
    """How many prompt `tokens` a step may compute while other choices generate.

    With a 142B model a whole ubatch of 512 tokens takes ten seconds on a CPU, and a fraction of a
    second on a GPU. So after each step that used the whole budget, the budget moves, by a factor of
    2 at most, towards the number of tokens with which a step takes a second.
    """

    def __init__(self, n_ubatch: int) -> None:
        self._n_ubatch = n_ubatch
        self.tokens = min(_MIN_PREFILL, n_ubatch)

    def record(self, prefilled: int, seconds: float) -> None:
        """Record how long a step took that computed `prefilled` prompt tokens."""
        if prefilled >= self.tokens:
            fitting = int(prefilled * _STEP_SECONDS / max(seconds, 1e-6))
            nearer = min(max(fitting, self.tokens // 2, _MIN_PREFILL), 2 * self.tokens)
            self.tokens = min(nearer, self._n_ubatch)


class Scheduler:
    """Carries out requests, first in, first out; nothing else may use the engine until `close`.

    Each of the engine's sequences is a slot for one choice at a time. If a request has more choices
    than there are slots, its choices take turns.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        queue_size: int = 64,
        draft: Draft = "auto",
        cache: PromptCache | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the thread, which calls `on_end` last; up to `queue_size` choices may wait.

        Drafts are as long as `draft` says, and as the engine's `n_draft`. Earlier prompts are
        kept in the `cache`.

        Raises:
            UsageError: the engine has several sequences but no shared cache, or its ubatch has no
                room for a token of each sequence.
        """
        _check_engine(engine)
        self._engine = engine
        self.cache = cache or PromptCache(engine, 0)
        self._slots = Slots(engine, self.cache)
        self._queue = Queue(queue_size, len(self._slots))
        self._budget = PrefillBudget(engine.n_ubatch)
        self._draft_policy = DraftPolicy.choose(draft, engine)
        self._running: list[Choice] = []  # oldest first
        self._on_end = on_end
        self.failed = False  # the thread ended although nobody closed the scheduler
        self._thread = Thread(target=self._run, name="dots1-engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> Load:
        """The load at this moment."""
        running = sum(not choice.handle.done for choice in list(self._running))
        return Load(running, len(self._queue), len(self._slots))

    @property
    def slots(self) -> list[SlotState]:
        """The slots at this moment."""
        found = {state.seq_id: SlotState(state.seq_id, len(state.tokens)) for state in self._slots}
        for choice in list(self._running):
            found[choice.slot.seq_id] = replace(
                found[choice.slot.seq_id],
                busy=True,
                prompt_tokens=len(choice.prompt),
                generated_tokens=choice.n_generated,
            )
        return list(found.values())

    def submit(
        self, requests: Sequence[GenerationRequest], callback: Callable[[Event], None]
    ) -> RequestHandle:
        """Queue all choices of a request, or none.

        `callback` receives their events in the engine's thread, so it must not block.

        Raises:
            QueueFull: too many choices are waiting.
            UsageError: a request cannot be carried out.
            Dots1Error: a prompt fills the context, or the scheduler is closed.
        """
        for request in requests:
            _check_request(request, self._engine)
        handle = RequestHandle(callback)
        self._queue.put(handle, requests, self.load.running)
        return handle

    def close(self, timeout: float) -> bool:
        """Refuse new requests, finish what can be finished in `timeout` seconds, fail the rest.

        Return when the thread has ended, so that the engine is free, which takes a ubatch more.
        Return False if it takes 5 seconds more. `close` may be called again, even with a shorter
        timeout.
        """
        self._queue.close(_SHUTDOWN, timeout)
        self._thread.join(timeout + _LAST_STEP)
        return not self._thread.is_alive()

    def abort(self, reason: str) -> None:
        """Fail all requests from another thread, whatever the engine is doing, and for good."""
        self._queue.close(reason, 0)
        for choice in list(self._running):
            choice.handle.deliver(Failed(reason))
        self._fail_waiting(reason)

    def _run(self) -> None:
        reason = "the engine has failed and cannot continue"
        try:
            while self._work_to_do():
                try:
                    self._step()
                except Exception as error:
                    self._fail_running(_sentence(error))
                    self._slots.forget()  # the contents are unknown now
            reason = _SHUTDOWN
        except Exception:
            _log.exception("the engine's thread cannot continue")
            self.failed = True
        finally:
            self._end(reason)
            self._on_end()

    def _end(self, reason: str) -> None:
        self._queue.close(reason, 0)
        self._fail_running(reason)
        self._fail_waiting(reason)
        with suppress(Exception):
            self._slots.close()

    def _fail_waiting(self, reason: str) -> None:
        while queued := self._queue.pop():
            queued.handle.deliver(Failed(reason))

    def _work_to_do(self) -> bool:
        for choice in [each for each in self._running if each.handle.done]:
            self._remove(choice)
        return self._queue.wait_for_work(bool(self._running) or self._slots.unsaved)

    def _step(self) -> None:
        self._admit()
        self._restore(wait=False)
        parts = self._compose()
        if not parts:
            if not self._restore(wait=True):
                self._slots.save(wait=True)
            return
        for choice, _ in parts:
            self._report(choice)
        prefilled = sum(len(entries) for choice, entries in parts if choice.prefilling)
        start = time.perf_counter()
        rows = self._engine.submit([entry for _, entries in parts for entry in entries])
        seconds = time.perf_counter() - start
        self._budget.record(prefilled, seconds)
        place = row = 0
        for choice, entries in parts:
            choice.computed(entries, seconds)
            self._report(choice)
            place += len(entries)
            if count := sum(entry.logits for entry in entries):
                self._sample(choice, rows[row : row + count], place - count)
                row += count
        self._slots.save(wait=False)

    def _restore(self, *, wait: bool) -> bool:
        """Restore a part of each prompt that is in the prompt cache; return whether there is one.

        With `wait`, wait for the disk.
        """
        restoring = [choice for choice in self._running if choice.slot.restoring]
        for choice in restoring:
            self._slots.restore(choice.slot, choice.prompt, choice.scored, wait=wait)
        return bool(restoring)

    def _admit(self) -> None:
        while self._slots.any_free and (queued := self._queue.pop()):
            try:
                self._start(queued)
            except Exception as error:
                queued.handle.deliver(Failed(_sentence(error)))

    def _start(self, queued: QueuedChoice) -> None:
        soon = self._queue.next_in_line(len(self._slots))
        request, prompts = queued.request, [each.request.prompt for each in soon]
        slot = self._slots.take(
            request.prompt, prompts, request.prompt_logprobs, reuse=request.cache_prompt
        )
        try:
            choice = Choice(queued, slot, self._engine, self._draft_policy)
        except BaseException:
            self._slots.release(slot)
            raise
        choice.wait_for_prefix(self._running)
        self._running.append(choice)

    def _compose(self) -> list[tuple[Choice, list[Entry]]]:
        """Compose the next ubatch: a token of each choice that generates, then prompts."""
        writing = [choice for choice in self._running if not choice.prefilling]
        alone = len(self._running) == 1
        parts = [(choice, choice.next_entries(alone=alone)) for choice in writing]
        room = self._engine.n_ubatch - len(parts)
        if parts:
            room = min(room, self._budget.tokens)
        spare = self._engine.params.n_outputs - len(self._running)  # each choice needs an output
        for age, choice in enumerate(self._running):
            if room and choice.prefilling and choice.ready(self._slots, self._running[:age]):
                parts.append((choice, choice.prompt_entries(room, 1 + spare)))
                room -= len(parts[-1][1])
                if choice.scored is not None:
                    spare -= len(parts[-1][1]) - 1
        return parts

    @staticmethod
    def _report(choice: Choice) -> None:
        if progress := choice.progress():
            choice.handle.deliver(progress)

    def _sample(self, choice: Choice, rows: NDArray[np.float32], place: int) -> None:
        if choice.handle.done:
            return
        try:
            events = list(choice.sample(rows, place))
        except Exception as error:
            self._slots.empty(choice.slot)
            events = [Failed(_sentence(error))]
        if choice.done:  # free the slot before the client sends its next request
            self._queue.record(time.monotonic() - choice.started)
            self._remove(choice)
        for event in events:
            choice.handle.deliver(event)

    def _remove(self, choice: Choice) -> None:
        choice.close()
        self._slots.release(choice.slot)
        self._running.remove(choice)

    def _fail_running(self, reason: str) -> None:
        for choice in self._running:
            choice.handle.deliver(Failed(reason))
            choice.close()
        self._running.clear()


def _check_engine(engine: Engine) -> None:
    n_sequences = engine.params.n_sequences
    if n_sequences > 1 and not engine.params.shared_cache:
        raise UsageError("open the engine with shared_cache to serve several sequences")
    if engine.n_ubatch < n_sequences:
        raise UsageError(
            f"a ubatch of {engine.n_ubatch} tokens has no room for one token of each of "
            f"{n_sequences} sequences"
        )


def _check_request(request: GenerationRequest, engine: Engine) -> None:
    """Refuse a request that would fail later and make other requests fail with it."""
    if not request.prompt:
        raise UsageError("the prompt is empty; give the beginning of a text")
    if not all(0 <= token < engine.n_vocab for token in request.prompt):
        raise UsageError(f"a prompt's tokens must be from 0 to {engine.n_vocab - 1}")
    if request.max_tokens is not None and request.max_tokens < 0:
        raise UsageError(f"max_tokens is {request.max_tokens}; it must be at least 0")
    check_stop(request.stop)
    if len(request.prompt) > engine.n_ctx - (request.max_tokens != 0):
        raise Dots1Error(
            f"the prompt is {len(request.prompt):,} tokens long and the context holds "
            f"{engine.n_ctx:,}, including the answer"
        )


def _sentence(error: Exception) -> str:
    """Return what clients are told of an error; a bug's details go to the log alone."""
    if isinstance(error, Dots1Error):
        return str(error)
    _log.error("the engine's thread met a bug", exc_info=error)
    return "something went wrong in the server; its log says what"
