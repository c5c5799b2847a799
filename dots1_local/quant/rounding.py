"""Matrices as they are after being stored in a type: what `Segment.rounding` wants."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from dots1_local.quant.encode import decode, encode
from dots1_local.quant.types import QuantType

__all__ = ["through"]

_PIECE = 1 << 20  # weights encoded at a time


def through(kind: QuantType, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """A function that stores a matrix [rows, columns] in `kind`, without importance, and decodes
    it to F32.

    A matrix whose rows are no whole number of blocks comes back as it is.
    """

    def rounded(stored: Tensor) -> Tensor:
        columns = stored.shape[1]
        if not kind.fits(columns):
            return stored
        out = torch.empty(stored.shape)
        step = max(1, _PIECE // columns)

        def fill(start: int) -> None:
            rows = stored[start : start + step].float().contiguous().numpy()
            decoded = decode(encode(rows, kind), kind, columns)
            out[start : start + step] = torch.from_numpy(decoded)

        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            list(pool.map(fill, range(0, len(stored), step)))
        return out

    return rounded
