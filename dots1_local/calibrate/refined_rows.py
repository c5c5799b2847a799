"""The errors of a few rows that are refined, and of the same rows as ggml rounds them.

The error of refined rows is the mean square of the change in their outputs, over inputs that the
metric does not know. The error of ggml's rows is what the sensitivity predicts: from the mean
squares of the input columns alone.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from dots1_local.architecture import TensorSpec
from dots1_local.calibrate.output_errors import candidates
from dots1_local.calibrate.refined_errors import ErrorPair, ErrorRows
from dots1_local.ggml import TYPES, QuantType
from dots1_local.quant.encode import decode, encode
from dots1_local.quant.importance import pad_columns
from dots1_local.refine.blocks import refinable
from dots1_local.refine.matrix import refine_matrix
from dots1_local.refine.metric import Metric

__all__ = ["JudgedRows", "RowSample", "all_errors", "in_parallel"]

_TYPICAL = "Q3_K", "IQ4_NL"  # the first that fits: its errors are kept

Floats = NDArray[np.float32]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class RowSample:
    """Rows (n, columns) of one matrix, and the inputs that their errors are judged by.

    `numbers` (n,) are those of the rows. `spec` has the padded width if the tensor may be padded.
    `held_out` (m, columns) are inputs that the metric does not know; `importance` (columns,) is for
    ggml's encoder.
    """

    spec: TensorSpec
    numbers: NDArray[np.int64]
    rows: Floats
    metric: Metric
    held_out: Floats
    importance: Floats | None

    def judged(self, kind: QuantType) -> tuple[ErrorPair, ErrorRows | None]:
        """The squared errors of all rows' outputs: refined, and as predicted of ggml's bytes.

        They are NaN or infinite if the weights are too large for the type. The second result is for
        a typical type only.
        """
        squares = np.square(self.held_out, dtype=np.float64).mean(axis=0)
        with np.errstate(all="ignore"):
            refined, plain = self.refined(kind), self.plain(kind)
            changes = self.held_out @ refined.T
            after = np.square(changes, dtype=np.float64).sum() / len(self.held_out)
            before = (np.square(plain, dtype=np.float64) @ squares).sum()
        pair = float(after), float(before)
        if kind != _typical(self.spec):
            return pair, None
        return pair, ErrorRows(self.numbers, np.stack([refined, plain]))

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
