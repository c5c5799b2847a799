"""Log-probabilities of a token and of its likeliest alternatives."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dots1_local.serve.generation import TokenLogprob

__all__ = ["token_logprob"]


def token_logprob(
    logits: NDArray[np.float32], token: int, top: int, piece: Callable[[int], bytes]
) -> TokenLogprob:
    """The log-softmax of a row (n_vocab,) at `token` and at its `top` likeliest, best first."""
    maximum = logits.max()
    # Float32 is enough for each term; a float32 sum of 152,064 of them would not be.
    total = np.log(np.exp(logits - maximum).sum(dtype=np.float64))

    def at(which: int) -> float:
        return min(0.0, float(np.float64(logits[which]) - maximum - total))

    best = [(each, piece(each), at(each)) for each in _likeliest(logits, top)]
    return TokenLogprob(token, piece(token), at(token), tuple(best))


def _likeliest(logits: NDArray[np.float32], count: int) -> list[int]:
    count = min(count, len(logits))
    if not count:
        return []
    chosen = np.argpartition(logits, len(logits) - count)[len(logits) - count :]
    # Of equals the lower id first, as llama.cpp takes it.
    order = np.lexsort((chosen, -logits[chosen]))
    found: list[int] = chosen[order].tolist()
    return found
