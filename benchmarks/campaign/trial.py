"""What a part of the campaign is made of: things that are tried, and what must hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

__all__ = ["Broken", "Part", "Trial"]

Trial = Callable[[Random, Path], int | None]
"""Try one case, drawn from the random numbers, in an empty folder; raise `Broken` if it fails.

A trial that tries several at once returns how many."""


class Broken(Exception):
    """What must hold did not; one sentence says what was seen."""


@dataclass(frozen=True)
class Part:
    """Trials that share what must hold.

    `trials` maps a name, the first column of the table, to what tries it and how often by default.
    """

    must_hold: str
    trials: Mapping[str, tuple[Trial, int]]
