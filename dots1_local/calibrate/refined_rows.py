"""The errors of a few rows that are refined, and of the same rows as ggml rounds them.

The error of refined rows is the mean square of the change in their outputs, over inputs that the
metric does not know. The error of ggml's rows is what the sensitivity predicts: from the mean
squares of the input columns alone. A row of the embedding has no inputs, but gradients where its
token stands.
"""

import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from dots1_local.architecture import TensorSpec
from dots1_local.calibrate.output_errors import candidates, draw_rows
from dots1_local.calibrate.refined_errors import ErrorPair, ErrorRows
from dots1_local.ggml import TYPES, QuantType
from dots1_local.quant.encode import decode, encode
from dots1_local.quant.importance import pad_columns
from dots1_local.refine.blocks import refinable
from dots1_local.refine.matrix import refine_matrix
from dots1_local.refine.metric import Metric

__all__ = ["DrawnRows", "EmbeddingSample", "JudgedRows", "RowSample", "all_errors", "in_parallel"]

_TYPICAL = "Q3_K", "IQ4_NL"  # the first that fits: its errors are kept

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class DrawnRows:
    """The `numbers` (n,) of some rows of a matrix, the probabilities `chances` (n,) that they were
    drawn with, and the `costs` (n,) of the same error in each."""

    numbers: NDArray[np.int64]
    chances: Doubles
    costs: Doubles

    @classmethod
    def of(cls, name: str, costs: Doubles, count: int) -> "DrawnRows":
        """Draw about `count` rows of the matrix `name`, where `costs` (rows,) are those of all."""
        seed = zlib.crc32(name.encode())
        if (costs == costs[0]).all():  # rows at equal distances would be the same of every head
            count = min(count, len(costs))
            numbers = np.random.default_rng(seed).choice(len(costs), count, replace=False)
            numbers, chances = np.sort(numbers), np.full(count, count / len(costs))
        else:
            numbers, chances = draw_rows(costs[None], count, seed)
        return cls(numbers, chances, costs[numbers])

    @classmethod
    def all_of(cls, rows: int) -> "DrawnRows":
        """All rows of a matrix."""
        return cls(np.arange(rows), np.ones(rows), np.ones(rows))


@dataclass(frozen=True)
class RowSample:
    """Rows (n, columns) of one matrix, and the inputs that their errors are judged by.

    `drawn` says which rows they are. `spec` has the padded width if the tensor may be padded.
    `held_out` (m, columns) are inputs that the metric does not know; `importance` (columns,) is for
    ggml's encoder.
    """

    spec: TensorSpec
    drawn: DrawnRows
    rows: Floats
    metric: Metric
    held_out: Floats
    importance: Floats | None

    def judged(self, kind: QuantType) -> tuple[ErrorPair, ErrorRows | None]:
        """The squared errors of all rows' outputs: refined, and as predicted of ggml's bytes.

        They are NaN or infinite if the weights are too large for the type. The second result is for
        a typical type only.
        """
        with np.errstate(all="ignore"):
            refined, plain = self.refined(kind), self.plain(kind)
            pair = self.squares(refined, plain)
        if kind != _typical(self.spec):
            return pair, None
        return pair, ErrorRows(self.drawn.numbers, self.drawn.chances, np.stack([refined, plain]))

    def squares(self, refined: Floats, plain: Floats) -> ErrorPair:
        """The squared errors that refined and plain errors (n, columns) of the rows make."""
        squares = np.square(self.held_out, dtype=np.float64).mean(axis=0)
        after = np.square(self.held_out @ refined.T, dtype=np.float64).mean(axis=0)
        before = np.square(plain, dtype=np.float64) @ squares
        weights = self.drawn.costs / self.drawn.chances
        return float(weights @ after), float(weights @ before)

    def refined(self, kind: QuantType) -> Floats:
        """The errors (n, columns) of the refined rows."""
        found = refine_matrix(
            self.rows,
            kind,
            self.metric,
            self.held_out,
            columns=self._stored(kind),
            importance=self.importance,
        )
        return self._error(found.data[: len(self.rows)], kind)

    def plain(self, kind: QuantType) -> Floats:
        """The errors (n, columns) of ggml's bytes."""
        stored = self._stored(kind)
        weights = None
        if self.importance is not None:
            weights = pad_columns(self.importance[None], stored)[0]
        return self._error(encode(pad_columns(self.rows, stored), kind, weights), kind)

    def _stored(self, kind: QuantType) -> int:
        columns = self.rows.shape[1]
        return columns if kind.fits(columns) else self.spec.columns

    def _error(self, data: NDArray[np.uint8], kind: QuantType) -> Floats:
        decoded = decode(data, kind, self._stored(kind))
        return decoded[:, : self.rows.shape[1]] - self.rows


@dataclass(frozen=True)
class EmbeddingSample(RowSample):
    """Rows of the embedding; `gradients` has those (m, columns) where each row's token stands,
    which are the costs of errors.

    `held_out` are gradients anywhere.
    """

    gradients: Sequence[Floats]

    def squares(self, refined: Floats, plain: Floats) -> ErrorPair:
        after, before = (
            [
                float(np.square(at @ row, dtype=np.float64).sum())
                for at, row in zip(self.gradients, errors, strict=True)
            ]
            for errors in (refined, plain)
        )
        weights = 1 / self.drawn.chances
        return float(weights @ after), float(weights @ before)


@dataclass
class JudgedRows:
    """The errors of a sample by type, and the rows' own errors in a typical one, if that fits."""

    pairs: dict[str, ErrorPair] = field(default_factory=dict)
    rows: ErrorRows | None = None


def all_errors(samples: Mapping[str, RowSample], threads: int | None) -> dict[str, JudgedRows]:
    """The errors of each sample and type; types that cannot hold the weights are left out."""
    wanted = [
        (name, kind)
        for name, sample in samples.items()
        for kind in candidates(sample.spec, sample.importance is not None)
        if refinable(kind)
    ]
    for sample in samples.values():  # before threads share them
        _ = sample.metric.factor, sample.metric.samples
    found = {name: JudgedRows() for name in samples}

    judged = in_parallel(wanted, lambda each: samples[each[0]].judged(each[1]), threads)
    for (name, kind), (pair, rows) in zip(wanted, judged, strict=True):
        if all(map(math.isfinite, pair)):
            found[name].pairs[kind.name] = pair
            found[name].rows = rows or found[name].rows
    return found


def _typical(spec: TensorSpec) -> QuantType | None:
    """A type of medium size, which stands for the others."""
    fitting = (TYPES[name] for name in _TYPICAL if TYPES[name].fits(spec.columns))
    return next(fitting, None)


def in_parallel(
    items: Sequence[T], function: Callable[[T], R], threads: int | None = None
) -> list[R]:
    """The results, in order, of a function that computes on one thread; by default on all cores."""
    pool = ThreadPoolExecutor(threads or os.cpu_count())
    try:
        with threadpool_limits(1, "blas"):
            return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)
