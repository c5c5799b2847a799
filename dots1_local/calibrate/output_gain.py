"""How much more refinement gains where it knows what errors at the outputs of a matrix cost.

Matrices that write to the residual stream are refined with HO, the second moment of the gradients
there: the errors of their rows may cancel. One whole matrix of each layer is refined with HO and
without it, to a few types. What it gains stands for the other matrices of the layer that write
there, and for types of similar size. HO is made from half of the tokens, and judged by the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import TensorSpec
from dots1_local.calibrate.output_errors import read_rows
from dots1_local.calibrate.refined_errors import JudgedMatrix
from dots1_local.calibrate.refined_rows import DrawnRows, RowSample, in_parallel
from dots1_local.calibrate.refinement_file import gradient_moment
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.ggml import TYPES, QuantType
from dots1_local.refine.metric import Metric, output_metric

__all__ = ["OutputGain", "output_gain"]

_TYPES = ("IQ2_XXS", "Q3_K", "IQ4_XS", "Q5_K")
_SMALL_BLOCKS = ("IQ4_NL",)  # for rows that the others do not fit

Floats = NDArray[np.float32]
Pair = tuple[float, float]


@dataclass(frozen=True)
class OutputGain:
    """The cost of refined errors with HO by that without, for damage and for flips, of some types.

    The cost without HO is the predicted one, where every row's errors count alone.
    """

    measured: Mapping[str, Pair]

    def of(self, kind: QuantType) -> Pair:
        """The gain of any type; between types that were measured, it follows bits per weight."""
        if not self.measured:
            return 1.0, 1.0
        ordered = sorted(self.measured, key=lambda name: TYPES[name].bpw)
        bits = [TYPES[name].bpw for name in ordered]
        logs = np.log([self.measured[name] for name in ordered]).T
        damage, flips = (np.exp(np.interp(kind.bpw, bits, each)) for each in logs)
        return float(damage), float(flips)


def output_gain(
    matrix: JudgedMatrix,
    spec: TensorSpec,
    checkpoint: Checkpoint,
    kl: Floats,
    tie: Floats,
    threads: int | None,
) -> OutputGain:
    """Refine a whole matrix of the tensor `spec` in several ways.

    `kl` and `tie` (draws, ..., hidden) are the gradients at the layer's output.

    Raises:
        CheckpointError: the matrix is unreadable, or a weight is NaN or infinite.
    """
    kl = kl.reshape(len(kl), -1, kl.shape[-1])
    half = kl.shape[1] // 2
    outputs = output_metric(gradient_moment(kl[:, :half]))
    costs = gradient_moment(kl[:, half:]), gradient_moment(tie)
    drawn = DrawnRows.all_of(spec.source_shape[0])
    rows = read_rows(checkpoint, matrix.source, drawn.numbers)
    samples = [
        RowSample(
            spec, drawn, rows, Metric(matrix.metric, each), matrix.held_out, matrix.importance
        )
        for each in (None, outputs)
    ]
    _ = samples[0].metric.factor, samples[1].metric.factor  # before threads share them
    fits = all(TYPES[name].fits(spec.columns) for name in _TYPES)
    kinds = [TYPES[name] for name in (_TYPES if fits else _SMALL_BLOCKS)]
    kinds = [kind for kind in kinds if kind.fits(spec.columns)]
    jobs = [(sample, kind) for kind in kinds for sample in samples]
    changes = in_parallel(jobs, lambda job: job[0].refined(job[1]) @ matrix.held_out.T, threads)
    gains = {}
    for kind, alone, coupled in zip(kinds, changes[::2], changes[1::2], strict=True):
        damage, flips = (_gain(each, alone, coupled) for each in costs)
        gains[kind.name] = damage, flips
    return OutputGain(gains)


def _gain(costs: Floats, alone: Floats, coupled: Floats) -> float:
    """The cost of `coupled` changes (rows, inputs) by that of those where each row was `alone`."""
    before = np.diag(costs) @ np.square(alone).sum(axis=1)
    after = float(np.vdot(costs @ coupled, coupled))
    return after / before if before > 0 and after > 0 else 1.0
