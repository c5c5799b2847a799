"""Where gradients of KL divergence begin: random ones at the logits, taken back through the head.

The Hessian of KL(P, Q) in Q's logits is, where Q is P, diag(p) - p p' for each token; it is also
the Fisher information of the model's own predictions. Gradients drawn with it for a covariance
make KL divergence a mean over draws: that of (sum of g dy)^2 / 2 for any small change dy.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dots1_local.checkpoint import Checkpoint
from dots1_local.errors import CheckpointError
from dots1_local.reference.layers import rms_norm
from dots1_local.reference.weights import head_name, read_tensor

__all__ = ["check_finite", "generator", "top"]

_LOGITS = 1 << 25  # computed at a time: 134 MB, of which there are five


def generator(seed: int, layer: int) -> torch.Generator:
    """Random numbers of a layer's own, so that a run that is resumed there finds the same ones."""
    (state,) = np.random.SeedSequence((seed, layer)).generate_state(1)
    return torch.Generator().manual_seed(int(state))


def top(
    x: Tensor, checkpoint: Checkpoint, draws: int, random: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The `kl` draws at what leaves the last layer, and what the head's rows are worth.

    From `x` [chunks, positions, hidden]: gradients [draws, chunks, positions, hidden] beside it,
    and the expected square of the gradient at each logit, summed over tokens: [vocabulary], F64.
    Every position counts. `random` is a CPU's generator.

    Raises:
        CheckpointError: a tensor is missing or unreadable, or the gradient is NaN or infinite.
    """
    config = checkpoint.config
    norm = read_tensor(checkpoint, "model.norm.weight").to(device).float()
    head = read_tensor(checkpoint, head_name(config)).to(device).float()
    g = x.new_empty(draws, *x.shape)
    squares = torch.zeros(config.vocab_size, dtype=torch.float64)
    size = max(1, _LOGITS // config.vocab_size)
    rows, at_rows = x.view(-1, x.shape[-1]), g.view(draws, -1, x.shape[-1])
    for block in range(0, len(rows), size):
        part = rows[block : block + size].to(device).requires_grad_()
        normed = rms_norm(part, norm, config.rms_norm_eps)
        p = F.linear(normed.detach(), head).softmax(-1)
        squares += (p - p.square()).sum(0).cpu().double()
        for draw in at_rows:
            z = _logit_gradients(p, random)
            (back,) = torch.autograd.grad(normed, part, z @ head, retain_graph=True)
            draw[block : block + size] = back.to(g.device)
    check_finite((g, squares), "the head")
    return g, squares


def _logit_gradients(p: Tensor, random: torch.Generator) -> Tensor:
    """Normal with covariance diag(p) - p p' for each row of probabilities."""
    scaled = torch.randn(p.shape, generator=random).to(p.device).mul_(p.sqrt())
    return scaled.sub_(p * scaled.sum(-1, keepdim=True))


def check_finite(tensors: Iterable[Tensor], where: str) -> None:
    """A NaN or infinity shows in the sum, which needs no second copy."""
    if not all(torch.isfinite(tensor.sum()) for tensor in tensors):
        raise CheckpointError(
            f"the gradient at {where} is NaN or infinite; is the checkpoint damaged?"
        )
