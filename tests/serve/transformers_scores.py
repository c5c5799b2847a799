"""What transformers computes for the unquantised checkpoint."""

from collections.abc import Sequence

import torch
from transformers import Dots1ForCausalLM

__all__ = ["log_likelihood"]


def log_likelihood(
    model: Dots1ForCausalLM, before: Sequence[int], after: Sequence[int]
) -> tuple[float, bool]:
    """The sum of log-probabilities of `after`, and whether each token is the likeliest."""
    tokens = torch.tensor([[*before, *after]])
    with torch.inference_mode():
        rows = model(tokens).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
    target = torch.tensor(after)
    chosen = rows.gather(1, target[:, None])
    return float(chosen.sum()), bool((rows.argmax(-1) == target).all())
