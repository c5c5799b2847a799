"""Second moments of the inputs of a layer's matrices, and rows that are held out of them.

The moment of a matrix is H, the mean of x x' over its inputs x: the metric that the matrix's errors
are weighed by in refinement. Every 12th row is held out, or every 24th, 48th and so on: at most 512
rows from the whole text. They judge a refined matrix, which was fitted to the others.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.errors import CheckpointError

__all__ = ["Moment", "Moments", "moment_name"]

_EVERY, _HELD_OUT = 12, 512  # rows
_PANEL = 512  # columns whose products are computed together
_ROUTER = "mlp.gate.weight"
_SAME_INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Moment:
    """The mean (columns, columns) of x x' over `tokens` rows, and held-out rows (n, columns)."""

    mean: Floats
    tokens: int
    held_out: Floats


@dataclass
class _Sums:
    """The sum of x x' so far; of the square matrix, only the upper panels are computed.

    `held` are the rows whose numbers are multiples of `every`.
    """

    square: Tensor
    held: Tensor
    every: int = _EVERY
    tokens: int = 0
    seen: int = 0

    def add(self, rows: Tensor) -> None:
        numbers = torch.arange(self.seen, self.seen + len(rows), device=rows.device)
        is_held = numbers % self.every == 0
        self.held = torch.cat([self.held, rows[is_held].cpu()])
        self._fit(rows[~is_held])
        self.seen += len(rows)
        while len(self.held) > _HELD_OUT:
            self._fit(self.held[1::2].to(rows.device))
            self.held, self.every = self.held[::2], 2 * self.every

    def _fit(self, rows: Tensor) -> None:
        for start in range(0, rows.shape[1], _PANEL):
            panel = slice(start, start + _PANEL)
            self.square[panel, start:].addmm_(rows[:, panel].T, rows[:, start:])
        self.tokens += len(rows)

    def moment(self) -> Moment:
        self.square /= max(1, self.tokens)
        mean = self.square.cpu().numpy()
        for start in range(0, len(mean), _PANEL):
            end = start + _PANEL
            mean[end:, start:end] = mean[start:end, end:].T
        return Moment(mean, self.tokens, self.held.contiguous().numpy())


class Moments:
    """Gathers the second moments of the matrices of one layer, or of the head.

    `observe` is an `Observer`. Matrices with the same inputs share the moment that `moment_name`
    names: q, k and v, and gate and up. Routers have none.
    """

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def observe(self, name: str, rows: Tensor) -> None:
        """Add the rows [rows, columns] that the named matrix will be multiplied by."""
        if name == _ROUTER or moment_name(name) != name:
            return
        rows = rows.detach().float()
        if name not in self._sums:
            columns = rows.shape[1]
            square = torch.zeros(columns, columns, device=rows.device)
            self._sums[name] = _Sums(square, torch.empty(0, columns))
        self._sums[name].add(rows)

    def take(self, name: str) -> Moment | None:
        """Return the moment of the named matrix, and drop it; None if the matrix saw no row.

        Raises:
            CheckpointError: an input was NaN or infinite.
        """
        sums = self._sums.pop(name, None)
        if sums is None:
            return None
        if not torch.isfinite(sums.square.diagonal()).all():
            raise CheckpointError(
                f"an input of {name} is NaN or infinite; is the checkpoint damaged?"
            )
        return sums.moment()


def moment_name(name: str) -> str:
    """The name of the matrix whose moment the named matrix shares."""
    for part, same in _SAME_INPUTS.items():
        name = name.replace(f".{part}.", f".{same}.")
    return name
