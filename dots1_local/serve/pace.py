"""What recent times say about coming ones: how much to read in a step, when to come again."""

from collections import deque
from math import ceil
from statistics import fmean

__all__ = ["Pace", "Turnover"]

_STEP = 1.0  # seconds that a step should take at most while somebody waits for the next word
_LEAST = 32  # prompt tokens a step all the same: fewer cost hardly less, experts being read anyway
_REMEMBERED = 16


class Pace:
    """How many prompt tokens may go beside written ones, so that writers don't stall.

    A whole ubatch of 512 takes ten seconds where a 142B model runs on a CPU, and a fraction of one
    on a GPU. So the limit follows the last step that filled it, by a factor of 2 at most, to where
    such a step takes a second.
    """

    def __init__(self, n_ubatch: int) -> None:
        self._n_ubatch = n_ubatch
        self.beside = min(_LEAST, n_ubatch)

    def measured(self, read: int, seconds: float) -> None:
        """A step with so many prompt tokens took so long."""
        if read >= self.beside:
            fitting = int(read * _STEP / max(seconds, 1e-6))
            nearer = min(max(fitting, self.beside // 2, _LEAST), 2 * self.beside)
            self.beside = min(nearer, self._n_ubatch)


class Turnover:
    """How soon places become free, by how long the latest choices held theirs."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=_REMEMBERED)

    def took(self, seconds: float) -> None:
        """A choice was finished so many seconds after it began."""
        self._latest.append(seconds)

    def seconds(self, places: int, slots: int) -> int:
        """In how many seconds, 1 or more, so many places will have become free."""
        return max(1, ceil(fmean(self._latest or [1.0]) * places / slots))
