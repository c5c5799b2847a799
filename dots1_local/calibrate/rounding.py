"""Matrices as they are after being stored in a type: what `Segment.rounding` wants.

What llama.cpp loses by rounding what it multiplies its weights by.

Before a product with quantised weights its CPU kernels round activations to 8 bits, in blocks that
share a scale: of 32 for the types whose own blocks are of 32, of 256 for the others.

How far rounded weights take a model from itself, from what leaves its last layer with each.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.architecture import Dots1Config, inventory
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.ggml import QuantType
from dots1_local.quant.encode import decode, encode
from dots1_local.reference.layers import rms_norm
from dots1_local.reference.weights import Rounding, head_name, read_tensor

__all__ = [
    "BLOCKS",
    "ActivationNoise",
    "rounded_divergence",
    "through",
]


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


BLOCKS = (32, 256)
_LEVELS = 127


class ActivationNoise:
    """Mean squared errors of the activations that reach the matrices of one layer.

    `observe` is an `Observer`. Layer None stands for the head.
    """

    def __init__(self, config: Dots1Config, layer: int | None) -> None:
        prefix = "" if layer is None else f"model.layers.{layer}."
        specs = [spec for spec in inventory(config) if spec.layer == layer]
        self._columns = {
            source.removeprefix(prefix): spec.columns for spec in specs for source in spec.sources
        }
        self._sources = {
            spec.name: [source.removeprefix(prefix) for source in spec.sources] for spec in specs
        }
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def observe(self, name: str, rows: Tensor) -> None:
        """Take rows [rows, columns] into account that the named matrix will be multiplied by."""
        exact = rows.detach().float()
        errors = [(_rounded(exact, block) - exact).square().sum(0) for block in BLOCKS]
        sums = torch.stack(errors).double().cpu()
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._counts[name] = self._counts.get(name, 0) + len(rows)

    def by_name(self) -> Mapping[str, NDArray[np.float32]]:
        """By GGUF name, for either length of blocks: (2, experts, columns); 0 where none came."""
        return {
            name: np.stack([self._mean(source) for source in sources], axis=1)
            for name, sources in self._sources.items()
            if any(source in self._sums for source in sources)
        }

    def _mean(self, source: str) -> NDArray[np.float32]:
        if source not in self._sums:
            return np.zeros((len(BLOCKS), self._columns[source]), np.float32)
        return (self._sums[source] / self._counts[source]).float().numpy()


def _rounded(rows: Tensor, block: int) -> Tensor:
    columns = rows.shape[-1]
    blocks = F.pad(rows, (0, -columns % block)).unflatten(-1, (-1, block))
    scales = blocks.abs().amax(-1, keepdim=True) / _LEVELS
    rounded: Tensor = (blocks / scales.where(scales > 0, torch.ones_like(scales))).round_() * scales
    return rounded.flatten(-2)[..., :columns]


_VOCABULARY = 8192  # tokens of the vocabulary dealt with at a time
_ROWS = 1024  # positions; with as many tokens, 67 MB in F64


class _Divergence:
    """KL divergence of positions whose logits come in pieces of the vocabulary."""

    def __init__(self, rows: int, device: torch.device) -> None:
        none = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
        self._lse_p, self._lse_q = none, none
        self._mean = torch.zeros_like(none)  # of ln(p / q) as far as logits go, under p

    def add(self, p: Tensor, q: Tensor) -> None:
        """Take both models' logits [rows, some of the vocabulary] into account."""
        p, q = p.double(), q.double()
        lse = self._lse_p.logaddexp(p.logsumexp(-1))
        here = ((p - lse[:, None]).exp() * (p - q)).sum(-1)
        self._mean = self._mean * (self._lse_p - lse).exp() + here
        self._lse_p, self._lse_q = lse, self._lse_q.logaddexp(q.logsumexp(-1))

    def total(self) -> float:
        """The sum over the positions, in nats."""
        return float((self._mean - self._lse_p + self._lse_q).sum())


@torch.no_grad()
def rounded_divergence(
    exact: Tensor,
    rounded: Tensor,
    checkpoint: Checkpoint,
    rounding: Rounding,
    device: torch.device,
) -> float:
    """Mean KL divergence, in nats, of the rounded model from the exact one, over all positions.

    `exact` and `rounded` [chunks, positions, hidden] are what leaves their last layers. The head
    is rounded too, and a piece of it is in memory as F32 at a time.

    Raises:
        CheckpointError: the head is missing or unreadable.
    """
    config = checkpoint.config
    norm = read_tensor(checkpoint, "model.norm.weight").to(device).float()
    blocks = [x.flatten(0, 1).split(_ROWS) for x in (exact, rounded)]
    sums = [_Divergence(len(block), device) for block in blocks[0]]

    def logits(block: Tensor, head: Tensor) -> Tensor:
        return F.linear(rms_norm(block.to(device), norm, config.rms_norm_eps), head)

    for rows in read_tensor(checkpoint, head_name(config)).split(_VOCABULARY):
        true, coarse = rows.to(device).float(), rounding(rows).to(device).float()
        for divergence, p, q in zip(sums, *blocks, strict=True):
            divergence.add(logits(p, true), logits(q, coarse))
    return sum(divergence.total() for divergence in sums) / exact[..., 0].numel()
