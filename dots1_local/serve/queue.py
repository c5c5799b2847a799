"""Estimates from recent times: how much prompt to read in a step, and when a slot is free.

The queue of orders that wait for a slot: bounded, first in, first out.
"""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from statistics import fmean
from threading import Condition

from dots1_local.errors import Dots1Error
from dots1_local.serve.generation import Order, QueueFull, Ticket

__all__ = [
    "Pace",
    "Queue",
    "Turnover",
    "Waiting",
]


_STEP = 1.0  # seconds that a step should take at most while a choice waits for its next token
_LEAST = 32  # prompt tokens in a step: fewer take hardly less time, as the experts are read anyway
_REMEMBERED = 16


class Pace:
    """How many prompt tokens may go `beside` written ones in a step, so that writers don't stall.

    With a 142B model a whole ubatch of 512 takes ten seconds on a CPU, and a fraction of a second
    on a GPU. So after each step that reached the limit it moves, by a factor of 2 at most, towards
    the number with which a step takes a second.
    """

    def __init__(self, n_ubatch: int) -> None:
        self._n_ubatch = n_ubatch
        self.beside = min(_LEAST, n_ubatch)

    def measured(self, read: int, seconds: float) -> None:
        """Take note that a step that read so many prompt tokens took so many seconds."""
        if read >= self.beside:
            fitting = int(read * _STEP / max(seconds, 1e-6))
            nearer = min(max(fitting, self.beside // 2, _LEAST), 2 * self.beside)
            self.beside = min(nearer, self._n_ubatch)


class Turnover:
    """How soon places become free, judged by how long recent choices held theirs."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=_REMEMBERED)

    def took(self, seconds: float) -> None:
        """Take note that a choice was finished so many seconds after it began."""
        self._latest.append(seconds)

    def seconds(self, places: int, slots: int) -> int:
        """After how many seconds, 1 or more, so many places will probably be free."""
        return max(1, ceil(fmean(self._latest or [1.0]) * places / slots))


@dataclass(frozen=True)
class Waiting:
    """An order in the queue: the choice `index` of a request."""

    ticket: Ticket
    index: int
    order: Order


class Queue:
    """Any thread puts orders in; the engine's takes them out, and sleeps here while idle."""

    def __init__(self, size: int, slots: int) -> None:
        self._size, self._slots = size, slots
        self._waiting: deque[Waiting] = deque()
        self._refusal = ""  # why it takes no more
        self._deadline = math.inf  # of time.monotonic()
        self._changed = Condition()
        self.turnover = Turnover()

    def __len__(self) -> int:
        with self._changed:
            return sum(not each.ticket.over for each in self._waiting)

    def put(self, ticket: Ticket, orders: Sequence[Order], running: int) -> None:
        """Add a request's choices, all or none, where `running` others have a slot now.

        A request that finds nothing else to do is taken, however many choices it has.

        Raises:
            QueueFull: more would wait than the queue holds.
            Dots1Error: it is closed.
        """
        with self._changed:
            if self._refusal:
                raise Dots1Error(self._refusal)
            waiting = len(self)
            over = running + waiting + len(orders) - self._slots - self._size
            if running + waiting and over > 0:
                raise QueueFull(waiting, self.turnover.seconds(over, self._slots))
            self._waiting += (Waiting(ticket, index, order) for index, order in enumerate(orders))
            self._changed.notify()

    def pop(self) -> Waiting | None:
        """Take out the one that has waited longest, if any."""
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def next_in_line(self, count: int) -> list[Waiting]:
        """Up to `count` of those that will be popped next."""
        with self._changed:
            return list(islice(self._waiting, count))

    def work_to_do(self, busy: bool) -> bool:
        """True as soon as there is work: at once for a caller that is `busy`, else when some comes.

        False when the queue is closed, and no work is left or no time to do it.
        """
        with self._changed:
            while True:
                if any(each.ticket.over for each in self._waiting):
                    self._waiting = deque(each for each in self._waiting if not each.ticket.over)
                if time.monotonic() >= self._deadline:
                    return False
                if busy or self._waiting:
                    return True
                if self._refusal:
                    return False
                self._changed.wait()

    def close(self, reason: str, patience: float) -> None:
        """Refuse new orders from now on; `work_to_do` is False after `patience` seconds."""
        with self._changed:
            self._refusal = self._refusal or reason
            self._deadline = min(self._deadline, time.monotonic() + patience)
            self._changed.notify()
