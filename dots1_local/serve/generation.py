"""What HTTP threads and the engine's thread exchange: requests in a queue, and events."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from threading import Condition, RLock
from typing import Literal

from dots1_local.chat.constraint import Constraint
from dots1_local.chat.sampling import Sampling
from dots1_local.errors import Dots1Error

__all__ = [
    "Event", "Failed", "Finished", "GenerationRequest", "Piece", "Progress", "Queue", "QueueFull",
    "QueuedChoice", "RequestHandle", "Scored", "TokenLogprob",
]  # fmt: skip

_RECENT_CHOICES = 16  # the estimate of the waiting time averages so many durations
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationRequest:
    """One choice to generate: a continuation of `prompt`.

    With `max_tokens` None the answer may fill the context; with 0 there is none. With
    `top_logprobs` None the answer has no logprobs; a number asks for each token's own and those of
    that many likeliest tokens. `prompt_logprobs` asks for those of the prompt's tokens likewise;
    the answer's then include the end token's. `progress` asks how far the prompt is. The answer
    also ends before one of the `stop_tokens`. Without `cache_prompt` the whole prompt is computed.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    grammar: Constraint | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    progress: bool = False
    cache_prompt: bool = True


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and `top`: the likeliest tokens at its position with theirs.

    All are natural logarithms, before temperature, penalties and grammar. `rank` is 1 for the
    likeliest token.
    """

    token: int
    piece: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()
    rank: int = 0


@dataclass(frozen=True)
class Piece:
    """New text of the choice `index`; the text is "" if there are only logprobs."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Progress:
    """How far a choice's prompt is: one comes when it begins, and one after each of its steps.

    Of its `processed_tokens`, `cached_tokens` were in the KV cache already. The others took so many
    `seconds`.
    """

    index: int
    prompt_tokens: int
    cached_tokens: int
    processed_tokens: int
    seconds: float


@dataclass(frozen=True)
class Scored:
    """The logprobs of all tokens of a choice's prompt but the `first`, which nothing precedes."""

    index: int
    first: bytes
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Finished:
    """The last event of a choice; `cached_tokens` of its prompt were in the KV cache already.

    `stop` is the stop string that ended it, if any. Of `drafted_tokens`, `accepted_tokens` were
    right. The prompt took `prompt_seconds`, until the first token; the others took
    `answer_seconds`. Neither includes the time that the choice waited.
    """

    index: int
    reason: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    stop: str | None = None
    prompt_seconds: float = 0.0
    answer_seconds: float = 0.0


@dataclass(frozen=True)
class Failed:
    """The last event of a request, for all its choices: the engine failed or shuts down."""

    message: str


Event = Piece | Progress | Scored | Finished | Failed


class RequestHandle:
    """What `Scheduler.submit` returns; after `done` is set, no event is delivered."""

    def __init__(self, callback: Callable[[Event], None]) -> None:
        self._callback = callback
        self._lock = RLock()
        self.done = False

    def cancel(self) -> None:
        """Cancel the request, from any thread; nothing is delivered after this returns.

        The request's sequences become free before the next ubatch.
        """
        with self._lock:
            self.done = True

    def deliver(self, event: Event) -> None:
        """Call back with an event, unless `done`; a callback that raises is not called again."""
        with self._lock:
            if self.done:
                return
            self.done = isinstance(event, Failed)
            try:
                self._callback(event)
            except Exception:
                _log.exception("an event could not be delivered")
                self.done = True


class QueueFull(Dots1Error):
    """The queue is full; it may have room in about `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(waiting, retry_after)  # both, so that the error can be pickled
        self.waiting, self.retry_after = waiting, retry_after

    def __str__(self) -> str:
        return f"{self.waiting} answers are waiting already; try again in {self.retry_after} s"


@dataclass(frozen=True)
class QueuedChoice:
    """A choice that waits for a slot; `index` is its number within its HTTP request."""

    handle: RequestHandle
    index: int
    request: GenerationRequest


class Queue:
    """Choices that wait for a slot, first in, first out.

    Any thread puts choices in. The engine's thread takes them out, and sleeps here while idle.
    """

    def __init__(self, size: int, slots: int) -> None:
        self._size, self._slots = size, slots
        self._waiting: deque[QueuedChoice] = deque()
        self._closed = ""  # the reason, once the queue is closed
        self._deadline = math.inf  # of time.monotonic()
        self._changed = Condition()
        self._recent: deque[float] = deque(maxlen=_RECENT_CHOICES)  # seconds with a slot

    def __len__(self) -> int:
        with self._changed:
            return sum(not each.handle.done for each in self._waiting)

    def put(
        self, handle: RequestHandle, requests: Sequence[GenerationRequest], running: int
    ) -> None:
        """Add all choices of a request, or none, while `running` others have a slot.

        Raise QueueFull if too many choices would wait, or a Dots1Error if the queue is closed. An
        idle scheduler accepts a request with any number of choices.
        """
        with self._changed:
            if self._closed:
                raise Dots1Error(self._closed)
            waiting = len(self)
            excess = running + waiting + len(requests) - self._slots - self._size
            if running + waiting and excess > 0:
                seconds = fmean(self._recent or [1.0]) * excess / self._slots
                raise QueueFull(waiting, max(1, math.ceil(seconds)))
            self._waiting += (QueuedChoice(handle, i, each) for i, each in enumerate(requests))
            self._changed.notify()

    def record(self, seconds: float) -> None:
        """Record how long a finished choice held its slot, to estimate when the next is free."""
        self._recent.append(seconds)

    def pop(self) -> QueuedChoice | None:
        """Take out the choice that has waited longest, if any."""
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def next_in_line(self, count: int) -> list[QueuedChoice]:
        """Return up to `count` of the choices that will be popped next."""
        with self._changed:
            return list(islice(self._waiting, count))

    def wait_for_work(self, busy: bool) -> bool:
        """Return True as soon as there is work: at once if the caller is `busy`.

        Return False once the queue is closed and there is no work left, or no time for it.
        """
        with self._changed:
            while True:
                if any(each.handle.done for each in self._waiting):
                    self._waiting = deque(each for each in self._waiting if not each.handle.done)
                if time.monotonic() >= self._deadline:
                    return False
                if busy or self._waiting:
                    return True
                if self._closed:
                    return False
                self._changed.wait()

    def close(self, reason: str, timeout: float) -> None:
        """Refuse new choices; `wait_for_work` returns False after `timeout` seconds."""
        with self._changed:
            self._closed = self._closed or reason
            self._deadline = min(self._deadline, time.monotonic() + timeout)
            self._changed.notify()
