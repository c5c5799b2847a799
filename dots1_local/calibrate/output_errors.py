"""The effects of each type on one tensor's output, estimated from a sample of its rows.

If a weight matrix has the error D, the predicted cost is

    1/2 * sum over rows of r * sum over columns of c * D^2,

where r is the cost of a unit of squared error at that row's output, and c the column's mean square
input. (For the embedding, r is how often a token occurs, and c the cost of an error.) There are two
costs, `damage` and `flips` (see `quant.sensitivity`), each with its own r and c.

Rows are encoded as in a conversion; every type gets the same rows. The C encoders take 12 ms on one
core for all types of a row of 4096. With the numbers of rows below dots.llm1 takes 1.2 hours of one
core; its conversion to Q4_K takes 3.4 hours, to IQ2_XXS 11.
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
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.safetensors import read_exactly
from dots1_local.files.scaled import multiply_scales
from dots1_local.ggml import TYPES, QuantType, to_float32
from dots1_local.quant.encode import decode, encode
from dots1_local.quant.importance import pad_columns
from dots1_local.quant.sensitivity import Effect

__all__ = ["REFERENCE", "Sample", "candidates", "draw_rows", "measure", "read_rows", "sample"]

REFERENCE = "Q4_0"  # without importance; the forward pass measures its KL divergence
_PIECE = 1 << 18  # weights encoded at a time
_ROUTED_ROWS, _ROWS = 1024, 512  # drawn from a tensor; each expert has its own column costs

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]

RowsOf = Callable[[int, Indices], Floats]
"""Called with an expert (0 if there are none) and ascending rows; returns them (n, columns)."""


@dataclass(frozen=True)
class _DrawnRows:
    """Some drawn rows of one expert, and the cost of errors in them."""

    expert: int
    rows: Floats  # (n, columns)
    row_costs: Doubles  # (3, n): for damage, flips, and the relative error
    column_costs: Doubles  # (3, columns)

    def total(self, values: Floats) -> Doubles:
        """The three costs (3,) of errors `values` (n, columns)."""
        by_column: Doubles = self.row_costs @ np.square(values, dtype=np.float64)
        return np.asarray((by_column * self.column_costs).sum(axis=1))


@dataclass(frozen=True)
class Sample:
    """Rows drawn from one tensor; `spec` has the padded width if the tensor may be padded."""

    spec: TensorSpec
    pieces: Sequence[_DrawnRows]

    def effects(
        self, kinds: Iterable[QuantType], importance: Floats | None, pool: ThreadPoolExecutor
    ) -> dict[str, Effect]:
        """The effects of each type; `importance` (experts, unpadded columns) is for the encoders.

        A type whose block scales cannot hold the weights is left out.
        """
        started = {
            kind.name: [pool.submit(self._errors, p, kind, importance) for p in self.pieces]
            for kind in kinds
        }
        whole = sum(float(piece.total(piece.rows)[2]) for piece in self.pieces)
        effects = {}
        for name, futures in started.items():
            damage, flips, error = sum((f.result() for f in futures), np.zeros(3)).tolist()
            if math.isfinite(damage + flips + error):
                effects[name] = Effect(error / whole if whole else 0.0, damage / 2, flips / 2)
        return effects

    def of_inputs(self, errors: Floats) -> Doubles:
        """Damage and flips (n, 2) of mean squared errors (n, experts, unpadded columns) of the
        inputs."""
        sums = np.zeros((len(errors), 2))
        for piece in self.pieces:
            by_column = piece.row_costs[:2] @ np.square(piece.rows, dtype=np.float64)
            sums += errors[:, piece.expert] @ by_column.T
        return sums / 2

    def _errors(self, piece: _DrawnRows, kind: QuantType, importance: Floats | None) -> Doubles:
        columns = piece.rows.shape[1]
        stored = columns if kind.fits(columns) else self.spec.columns
        weights = None
        if importance is not None:
            weights = pad_columns(importance[piece.expert, None], stored)[0].astype(np.float32)
        data = encode(pad_columns(piece.rows, stored), kind, weights)
        with np.errstate(all="ignore"):  # weights may be too large for the type
            return piece.total(decode(data, kind, stored)[:, :columns] - piece.rows)


def measure(
    drawn: Sample, importance: Floats | None, threads: int | None = None
) -> tuple[dict[str, Effect], Effect]:
    """The effects of every type under 16 bits that fits, and of `REFERENCE` without importance.

    The latter is 0 if `REFERENCE` does not fit the unpadded rows.

    Raises:
        CheckpointError: weights are too large for `REFERENCE`.
    """
    spec, reference_kind = drawn.spec, TYPES[REFERENCE]
    kinds = candidates(spec, importance is not None)
    pool = ThreadPoolExecutor(threads or os.cpu_count())
    try:
        effects = drawn.effects(kinds, importance, pool)
        if not reference_kind.fits(spec.source_shape[-1]):
            return effects, Effect(0.0, 0.0, 0.0)
        reference = drawn.effects([reference_kind], None, pool)
    finally:
        pool.shutdown(cancel_futures=True)
    if not reference:
        raise CheckpointError(f"{spec.name} has weights that are too large for {REFERENCE}")
    return effects, reference[REFERENCE]


def candidates(spec: TensorSpec, importance: bool) -> list[QuantType]:
    """The candidates under 16 bits that fit a tensor, padded or not.

    `REFERENCE` is left out: IQ4_NL is better at the same size.
    """
    return [
        kind
        for kind in TYPES.values()
        if kind.candidate
        and kind.bpw < 16
        and kind.name != REFERENCE
        and (importance or not kind.needs_importance)
        and (kind.fits(spec.source_shape[-1]) or kind.fits(spec.columns))
    ]


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

    `row_costs` (2, experts, rows) and `column_costs` (2 or 1, experts, columns) are unpadded, for
    damage and for flips. Relative errors have the weights of damage, unless these are all 0. By
    default each tensor has its own seed, so that sampling errors of tensors do not add up.

    Raises:
        CheckpointError: `rows_of` found the checkpoint damaged.
    """
    experts, rows = row_costs.shape[1:]
    by_row, by_column = _with_relative(row_costs, column_costs)
    if seed is None:
        seed = zlib.crc32(spec.name.encode())
    if count is None:
        count = _ROUTED_ROWS if spec.role == "routed" else _ROWS
    drawn, chances = draw_rows(by_row[:2], count, seed)
    pieces: list[_DrawnRows] = []
    for expert in range(experts):
        part = slice(*np.searchsorted(drawn, (expert * rows, (expert + 1) * rows)))
        if part.start < part.stop:
            values = rows_of(expert, drawn[part] - expert * rows)
            costs = by_row[:, drawn[part]] / chances[part]
            pieces += _split(_DrawnRows(expert, values, costs, by_column[:, expert]))
    return Sample(spec, pieces)


def _with_relative(
    row_costs: NDArray[np.floating], column_costs: NDArray[np.floating]
) -> tuple[Doubles, Doubles]:
    """Costs (3, experts x rows) and (3, experts, columns); the third is for the relative error."""
    rows = np.asarray(row_costs, np.float64).reshape(2, -1)
    columns = np.broadcast_to(np.asarray(column_costs, np.float64), (2, *column_costs.shape[1:]))
    kind = 0 if rows[0].any() else 1
    relative = rows[kind] if rows[kind].any() else np.ones(rows.shape[1])
    return np.stack([*rows, relative]), np.stack([*columns, columns[kind]])


def _split(drawn: _DrawnRows) -> Iterator[_DrawnRows]:
    """Pieces small enough to occupy all cores."""
    size = max(1, _PIECE // drawn.rows.shape[1])
    for start in range(0, len(drawn.rows), size):
        part = slice(start, start + size)
        rows = np.ascontiguousarray(drawn.rows[part])
        yield _DrawnRows(drawn.expert, rows, drawn.row_costs[:, part], drawn.column_costs)


def draw_rows(weights: Doubles, count: int, seed: int) -> tuple[Indices, Doubles]:
    """About `count` rows, ascending, and the probability with which each was drawn.

    `weights` (kinds, rows) are the terms of several sums to estimate; the probability of a row is
    proportional to its mean share of them. Terms divided by their probabilities give unbiased sums.
    A row of weight 0 is never drawn, unless all are 0; if at most `count` rows have a weight, all
    of them are drawn.
    """
    chances = _probabilities(_shares(weights), count)
    ticks = np.cumsum(chances) + np.random.default_rng(seed).random()
    # Systematic sampling: one row for each whole number that the cumulative sum passes. Neighbours
    # are rarely drawn together, so that every expert gets its share.
    drawn = np.flatnonzero((np.diff(np.floor(ticks), prepend=0) > 0) | (chances == 1))
    return drawn, chances[drawn]


def _shares(weights: Doubles) -> Doubles:
    """Each row's mean share (rows,) of the sums that are not 0."""
    totals = weights.sum(axis=1)
    if not totals.any():
        return np.full(weights.shape[1], 1 / weights.shape[1])
    shares: Doubles = weights[totals > 0] / totals[totals > 0, None]
    return np.asarray(shares.mean(axis=0))


def _probabilities(shares: Doubles, count: int) -> Doubles:
    """Probabilities, at most 1, that are proportional to `shares` and have the sum `count`."""
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


def read_rows(checkpoint: Checkpoint, name: str, rows: Indices) -> Floats:
    """Read ascending rows of a matrix: float32 (n, columns).

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
    multiply_scales(out, piece, rows)
    if not np.isfinite(out).all():
        bad = rows[int(np.argmin(np.isfinite(out).all(axis=1)))]
        raise CheckpointError(
            f"{name} has NaN or infinite weights in row {bad}; the checkpoint is damaged"
        )
    return out


def _runs(rows: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Start and length of each run of consecutive numbers."""
    for _, run in groupby(enumerate(rows), lambda pair: pair[1] - pair[0]):
        members = [row for _, row in run]
        yield members[0], len(members)
