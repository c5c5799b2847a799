"""Second moments of the inputs of a layer's matrices, and rows that are held out of them.

The moment of a matrix is H, the mean of x x' over its inputs x: the metric that the matrix's errors
are weighed by in refinement. Every 12th row is held out, up to 512 rows of a matrix. These rows
judge a refined matrix, which was fitted to the others.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.errors import CheckpointError

__all__ = ["HELD_OUT", "HELD_OUT_EVERY", "Moment", "Moments", "moment_name"]

HELD_OUT_EVERY, HELD_OUT = 12, 512
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
    """The sum of x x' so far; of the square matrix, only the upper panels are computed."""

    square: Tensor
    tokens: int = 0
    seen: int = 0
    held: list[Tensor] = field(default_factory=list)

    def add(self, rows: Tensor) -> None:
        number = torch.arange(self.seen, self.seen + len(rows), device=rows.device)
        # The limit is reached with the same row, however the rows are cut into blocks.
        is_held = (number % HELD_OUT_EVERY == 0) & (number < HELD_OUT_EVERY * HELD_OUT)
        self.held.append(rows[is_held].cpu())
        fitted = rows[~is_held]
        for start in range(0, fitted.shape[1], _PANEL):
            panel = slice(start, start + _PANEL)
            self.square[panel, start:].addmm_(fitted[:, panel].T, fitted[:, start:])
        self.seen += len(rows)
        self.tokens += len(fitted)

    def moment(self) -> Moment:
        self.square /= max(1, self.tokens)
        mean = self.square.cpu().numpy()
        for start in range(0, len(mean), _PANEL):
            end = start + _PANEL
            mean[end:, start:end] = mean[start:end, end:].T
        return Moment(mean, self.tokens, torch.cat(self.held).numpy())


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
            self._sums[name] = _Sums(torch.zeros(columns, columns, device=rows.device))
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
