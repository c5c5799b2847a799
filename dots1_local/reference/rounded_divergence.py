"""How far rounded weights take a model from itself, from what leaves its last layer with each."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dots1_local.checkpoint import Checkpoint
from dots1_local.reference.layers import rms_norm
from dots1_local.reference.weights import Rounding, head_name, read_tensor

__all__ = ["rounded_divergence"]

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
