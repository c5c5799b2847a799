"""Rows drawn from a tensor in place of all of them, and what each then stands for.

What each type does to one tensor's output, from a sample of its rows.

Let a weight matrix be off by D. What that costs is predicted as

    1/2 * sum over rows of r * sum over columns of c * D^2,

where r is what a unit of squared error costs at that output, and c the column's mean square input.
(For the embedding it is the other way round: r is how often a token occurs, c what an error costs.)
There are two costs, of two pairs of r and c: `damage` and `flips`, see `sensitivity`.

Rows are encoded just as conversion does it; every type gets the same ones. The reference C encoders
take 12 ms for all types of a row of 4096 on one core: dots.llm1 takes 1.2 hours of one, at the
numbers of rows below; converting it to Q4_K takes 3.4, to IQ2_XXS 11.
"""

import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import TensorSpec
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint, read_exactly
from dots1_local.ggml import TYPES, QuantType, to_float32
from dots1_local.quant.encode import decode, encode
from dots1_local.quant.importance import pad_columns
from dots1_local.quant.sensitivity import Effect

__all__ = [
    "REFERENCE",
    "RowsOf",
    "Sample",
    "candidates",
    "draw_rows",
    "measure",
    "read_rows",
    "row_count",
    "sample",
]


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


REFERENCE = "Q4_0"  # without importance: what the noise of a plan is measured with
_PIECE = 1 << 18  # weights encoded at a time

Floats = NDArray[np.float32]

RowsOf = Callable[[int, NDArray[np.int64]], Floats]
"""Called with an expert (0 where there are none) and ascending rows: gives (n, columns)."""


@dataclass(frozen=True)
class _Piece:
    """Some drawn rows of one expert, and what an error in them costs."""

    expert: int
    rows: Floats  # (n, columns)
    row_costs: Doubles  # (3, n): of damage, of flips, and of the relative error
    column_costs: Doubles  # (3, columns)

    def total(self, values: Floats) -> Doubles:
        """The three sums (3,) over squares of `values` (n, columns)."""
        by_column: Doubles = self.row_costs @ np.square(values, dtype=np.float64)
        return np.asarray((by_column * self.column_costs).sum(axis=1))


@dataclass(frozen=True)
class Sample:
    """Rows drawn from one tensor; `spec` has the columns they are padded to where they must be."""

    spec: TensorSpec
    pieces: Sequence[_Piece]

    def effects(
        self, kinds: Iterable[QuantType], importance: Floats | None, pool: ThreadPoolExecutor
    ) -> dict[str, Effect]:
        """What each type does; `importance` (experts, unpadded columns) guides the encoders.

        A type whose block scales cannot hold the weights is left out.
        """
        started = {
            kind.name: [pool.submit(self._errors, p, kind, importance) for p in self.pieces]
            for kind in kinds
        }
        own = sum(float(piece.total(piece.rows)[2]) for piece in self.pieces)
        effects = {}
        for name, futures in started.items():
            damage, flips, error = sum((f.result() for f in futures), np.zeros(3)).tolist()
            if math.isfinite(damage + flips + error):
                effects[name] = Effect(error / own if own else 0.0, damage / 2, flips / 2)
        return effects

    def of_inputs(self, errors: Floats) -> Doubles:
        """What mean squared errors (n, experts, unpadded columns) of the inputs do: damage and
        flips, (n, 2)."""
        sums = np.zeros((len(errors), 2))
        for piece in self.pieces:
            by_column = piece.row_costs[:2] @ np.square(piece.rows, dtype=np.float64)
            sums += errors[:, piece.expert] @ by_column.T
        return sums / 2

    def _errors(self, piece: _Piece, kind: QuantType, importance: Floats | None) -> Doubles:
        columns = piece.rows.shape[1]
        stored = columns if kind.fits(columns) else self.spec.columns
        guide = None
        if importance is not None:
            guide = pad_columns(importance[piece.expert, None], stored)[0].astype(np.float32)
        data = encode(pad_columns(piece.rows, stored), kind, guide)
        with np.errstate(all="ignore"):  # of weights that are too large
            return piece.total(decode(data, kind, stored)[:, :columns] - piece.rows)


def candidates(spec: TensorSpec, *, importance: bool) -> list[QuantType]:
    """The types under 16 bits that may store a tensor, unpadded or padded as `spec` is.

    `REFERENCE` is left out: IQ4_NL is better at the same size.
    """
    return [
        kind
        for kind in TYPES.values()
        if kind.bpw < 16
        and kind.name != REFERENCE
        and (importance or not kind.needs_importance)
        and (kind.fits(spec.source_shape[-1]) or kind.fits(spec.columns))
    ]


def row_count(spec: TensorSpec) -> int:
    """Rows to draw: each routed expert has columns of its own."""
    return 1024 if spec.role == "routed" else 512


def sample(
    spec: TensorSpec,
    rows_of: RowsOf,
    row_costs: NDArray[np.floating],
    column_costs: NDArray[np.floating],
    *,
    count: int | None = None,
    seed: int | None = None,
) -> Sample:
    """Draw about `count` rows of a tensor of the padded inventory.

    `row_costs` (2, experts, rows) and `column_costs` (2 or 1, experts, columns) are unpadded:
    of damage, then of flips. Relative errors are weighted as damage is, if anything is damaged.
    By default each tensor has a seed of its own, so that sampling errors do not add up.

    Raises:
        CheckpointError: from `rows_of`: the checkpoint is damaged.
    """
    experts, rows = row_costs.shape[1:]
    by_row, by_column = _with_relative(row_costs, column_costs)
    if seed is None:
        seed = zlib.crc32(spec.name.encode())
    drawn, chances = draw_rows(by_row[:2], count or row_count(spec), seed)
    pieces: list[_Piece] = []
    for expert in range(experts):
        of_it = slice(*np.searchsorted(drawn, (expert * rows, (expert + 1) * rows)))
        if of_it.start < of_it.stop:
            values = rows_of(expert, drawn[of_it] - expert * rows)
            costs = by_row[:, drawn[of_it]] / chances[of_it]
            pieces += _cut(_Piece(expert, values, costs, by_column[:, expert]))
    return Sample(spec, pieces)


def measure(
    drawn: Sample, importance: Floats | None, threads: int | None = None
) -> tuple[dict[str, Effect], Effect]:
    """What every candidate does, and what `REFERENCE` does without importance.

    The latter is nothing where it does not fit the unpadded rows.

    Raises:
        CheckpointError: weights are too large for it.
    """
    spec, kind = drawn.spec, TYPES[REFERENCE]
    kinds = candidates(spec, importance=importance is not None)
    pool = ThreadPoolExecutor(threads or os.cpu_count())
    try:
        effects = drawn.effects(kinds, importance, pool)
        if not kind.fits(spec.source_shape[-1]):
            return effects, Effect(0.0, 0.0, 0.0)
        reference = drawn.effects([kind], None, pool)
    finally:
        pool.shutdown(cancel_futures=True)
    if not reference:
        raise CheckpointError(f"{spec.name} has weights larger than {REFERENCE} holds")
    return effects, reference[REFERENCE]


def _with_relative(
    row_costs: NDArray[np.floating], column_costs: NDArray[np.floating]
) -> tuple[Doubles, Doubles]:
    """Costs (3, experts x rows) and (3, experts, columns): the third are the relative error's."""
    rows = np.asarray(row_costs, np.float64).reshape(2, -1)
    columns = np.broadcast_to(np.asarray(column_costs, np.float64), (2, *column_costs.shape[1:]))
    kind = 0 if rows[0].any() else 1
    relative = rows[kind] if rows[kind].any() else np.ones(rows.shape[1])
    return np.stack([*rows, relative]), np.stack([*columns, columns[kind]])


def _cut(piece: _Piece) -> Iterator[_Piece]:
    """Pieces small enough for all cores to have one."""
    step = max(1, _PIECE // piece.rows.shape[1])
    for start in range(0, len(piece.rows), step):
        part = slice(start, start + step)
        rows = np.ascontiguousarray(piece.rows[part])
        yield _Piece(piece.expert, rows, piece.row_costs[:, part], piece.column_costs)
