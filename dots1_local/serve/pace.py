"""Estimates from recent times: how much prompt to read in a step, and when a slot is free."""

from collections import deque
from math import ceil
from statistics import fmean

__all__ = ["Pace", "Turnover"]

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
