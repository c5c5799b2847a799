"""The KL divergence of the model with rounded weights, from the outputs of both models' layers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dots1_local.files.checkpoint import Checkpoint
from dots1_local.reference.layers import rms_norm
from dots1_local.reference.model import Rounding, head_name, read_tensor

__all__ = ["rounded_divergence"]

_VOCABULARY = 8192  # rows of the head that are rounded at a time
_ROWS = 1024  # positions; with as many rows of the head, 67 MB in F64


class _Divergence:
    """KL divergence of positions whose logits come in parts of the vocabulary."""

    def __init__(self, rows: int, device: torch.device) -> None:
        start = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
        self._lse_p, self._lse_q = start, start
        self._mean = torch.zeros_like(start)  # of the logits' difference, under p

    def add(self, p: Tensor, q: Tensor) -> None:
        """Add both models' logits [rows, part of the vocabulary]."""
        p, q = p.double(), q.double()
        lse = self._lse_p.logaddexp(p.logsumexp(-1))
        part = ((p - lse[:, None]).exp() * (p - q)).sum(-1)
        self._mean = self._mean * (self._lse_p - lse).exp() + part
        self._lse_p, self._lse_q = lse, self._lse_q.logaddexp(q.logsumexp(-1))

    def total(self) -> float:
        """The sum over all positions, in nats."""
        return float((self._mean - self._lse_p + self._lse_q).sum())


@torch.no_grad()
def rounded_divergence(
    exact: Tensor, rounded: Tensor, checkpoint: Checkpoint, rounding: Rounding, device: torch.device
) -> float:
    """Mean KL divergence, in nats, of the rounded model from the exact one, over all positions.

    `exact` and `rounded` [chunks, positions, hidden] are the outputs of their last layers. The head
    is rounded too; only a part of it is in memory as F32 at a time.

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
        exact_rows, rounded_rows = rows.to(device).float(), rounding(rows).to(device).float()
        for divergence, p, q in zip(sums, *blocks, strict=True):
            divergence.add(logits(p, exact_rows), logits(q, rounded_rows))
    return sum(divergence.total() for divergence in sums) / exact[..., 0].numel()
