"""Rows drawn from a tensor in place of all of them, and what each then stands for."""

from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from dots1_local.checkpoint import Checkpoint, read_exactly
from dots1_local.errors import CheckpointError
from dots1_local.quant.encode import to_float32

__all__ = ["draw_rows", "read_rows"]

Doubles = NDArray[np.float64]


def draw_rows(
    weights: Doubles, count: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """About `count` rows, ascending, and each one's probability of being among them.

    `weights` (kinds, rows) say how much a row counts, in each of several sums that are to be
    estimated; a row is drawn with probability proportional to its mean share of them. Dividing by
    the probabilities makes sums over the drawn rows unbiased. A row of no weight is never drawn,
    unless none has any; where there are no more than `count` others, they all are.
    """
    chances = _probabilities(_shares(weights), count)
    ticks = np.cumsum(chances) + np.random.default_rng(seed).random()
    # One row for each whole number that the sum passes: neighbours are hardly drawn together,
    # so that every expert gets its share.
    drawn = np.flatnonzero((np.diff(np.floor(ticks), prepend=0) > 0) | (chances == 1))
    return drawn, chances[drawn]


def read_rows(checkpoint: Checkpoint, name: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """The given rows, ascending, of a tensor of two dimensions: float32 (n, columns).

    Raises:
        CheckpointError: the tensor is missing or unreadable, or a weight is NaN or infinite.
    """
    piece = checkpoint.locate(name)
    columns = piece.shape[-1]
    row_bytes = columns * piece.item_bytes
    raw = np.empty((len(rows), row_bytes), np.uint8)
    done = 0
    try:
        with open(piece.file, "rb") as file:
            for start, count in _runs(rows.tolist()):
                part = raw[done : done + count].reshape(-1)
                read_exactly(file.fileno(), part, piece.offset + start * row_bytes, piece.file)
                done += count
    except OSError as error:
        raise CheckpointError(f"cannot read {piece.file}: {error.strerror}") from None
    out = np.empty((len(rows), columns), np.float32)
    to_float32(raw.reshape(-1), piece.dtype, out)
    if not np.isfinite(out).all():
        bad = rows[int(np.argmin(np.isfinite(out).all(axis=1)))]
        raise CheckpointError(
            f"{name} has NaN or infinite weights in row {bad}; the checkpoint is damaged"
        )
    return out


def _shares(weights: Doubles) -> Doubles:
    """Each row's mean share (rows,) of the sums that are not 0."""
    totals = weights.sum(axis=1)
    if not totals.any():
        return np.full(weights.shape[1], 1 / weights.shape[1])
    shares: Doubles = weights[totals > 0] / totals[totals > 0, None]
    return np.asarray(shares.mean(axis=0))


def _probabilities(shares: Doubles, count: int) -> Doubles:
    """Probabilities proportional to `shares`, but at most 1, that add up to `count`."""
    certain = np.zeros(len(shares), bool)
    while True:
        left, total = count - certain.sum(), shares[~certain].sum()
        scaled = shares * (left / total) if total > 0 else shares * 0
        reached = ~certain & (scaled >= 1)
        if left >= np.count_nonzero(shares[~certain]):
            reached = ~certain & (shares > 0)
        if not reached.any():
            return np.where(certain, 1.0, scaled)
        certain |= reached


def _runs(rows: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Start and length of each run of consecutive numbers."""
    for _, run in groupby(enumerate(rows), lambda pair: pair[1] - pair[0]):
        members = [row for _, row in run]
        yield members[0], len(members)
