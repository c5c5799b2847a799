"""Softmax in llama-perplexity's precision: exponentials in float32, their sums in float64."""

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import Dots1Error

__all__ = ["exp32", "log_sum_exp", "negative_log", "negative_log32"]

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


def exp32(x: Floats) -> Floats:
    """exp(x), rounded once: numpy's own float32 exp is off by more than C's expf."""
    out = np.empty_like(x)
    np.exp(x, dtype=np.float64, out=out, casting="same_kind")
    return out


def log_sum_exp(logits: Floats) -> tuple[Floats, Doubles]:
    """Of rows (n, n_vocab): their maxima (n,) and log(sum(exp(logits - maximum))) (n,).

    Raises:
        Dots1Error: a row has no finite maximum, as a damaged model gives it.
    """
    top: Floats = logits.max(axis=1)
    if not np.isfinite(top).all():
        raise Dots1Error("the model computes logits that are no numbers; is its file damaged?")
    sums = exp32(logits - top[:, None]).sum(axis=1, dtype=np.float64)
    return top, np.log(sums)


def negative_log(logits: Floats, targets: NDArray[np.int32]) -> Doubles:
    """-log softmax(logits)[target] of rows (n, n_vocab) and targets (n,)."""
    top, log_sum = log_sum_exp(logits)
    return log_sum - (logits[np.arange(len(targets)), targets] - top)


def negative_log32(logits: Floats, targets: NDArray[np.int32]) -> Floats:
    """The same in float32, as llama-perplexity has it when it writes or reads a logits file."""
    top, log_sum = log_sum_exp(logits)
    log_z = top + log_sum.astype(np.float32)
    nll: Floats = log_z - logits[np.arange(len(targets)), targets]
    return nll
