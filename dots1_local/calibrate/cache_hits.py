"""What a cache of experts would hit: exact LRU hits for all sizes at once, and a fixed hot set's.

An LRU cache of n experts holds the n experts that were used last, so one pass over a trace gives
the hits of every size: an expert is a hit if fewer than n others were used since its last use
(stack distances: Mattson et al., "Evaluation techniques for storage hierarchies", 1970). A layer
needs all experts of a token at once, so their distances are counted before any of them is loaded.

Layers share one cache, as in llama.cpp, where layers whose experts have equal types and shapes do.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["effective_experts", "lru_hit_rates", "stack_distances", "static_hit_rates"]

Choices = NDArray[np.uint8] | NDArray[np.uint16]


def stack_distances(trace: Choices, experts: int) -> NDArray[np.int32]:
    """How many other experts were used since the last use of each expert in a trace.

    `trace` (layers, tokens, experts per token) numbers the experts of each layer; tokens pass the
    layers in order. An LRU cache for all layers that holds at least one token's experts of a layer
    has an expert if its distance is less than the cache's size. Returns (layers, tokens, experts
    per token); the first use of an expert has the distance layers * experts.
    """
    layers, tokens, used = trace.shape
    size, per_token = layers * experts, layers * used
    keys = trace.transpose(1, 0, 2).astype(np.intp) + experts * np.arange(layers)[:, None]
    stack, place = np.arange(size), np.arange(size)  # experts by last use, and where each one is
    moved, seen = np.zeros(size, bool), np.zeros(size, bool)
    layer = np.repeat(np.arange(layers), used)
    earlier = layer[:, None] > layer  # of the same token, in layers before
    distances = np.empty((tokens, per_token), np.int32)
    for token, chosen in enumerate(keys.reshape(tokens, per_token)):
        depth = place[chosen]
        raised = np.count_nonzero((depth > depth[:, None]) & earlier, axis=1)
        distances[token] = np.where(seen[chosen], depth + raised, size)
        seen[chosen] = moved[chosen] = True
        stack = np.concatenate([chosen[::-1], stack[~moved[stack]]])
        place[stack] = np.arange(size)
        moved[chosen] = False
    return distances.reshape(tokens, layers, used).transpose(1, 0, 2)


def lru_hit_rates(
    distances: NDArray[np.int32], sizes: NDArray[np.int64], used: int
) -> NDArray[np.float64]:
    """The hit rate of each layer (layers, sizes) for caches of so many experts of all layers.

    A cache that cannot hold the `used` experts of a token holds none.
    """
    layers = len(distances)
    rows = np.sort(distances.reshape(layers, -1), axis=1)
    hits = np.stack([np.searchsorted(row, sizes) for row in rows])
    return np.where(sizes < used, 0.0, hits / rows.shape[1])


def static_hit_rates(
    chosen: Choices, measured: Choices, experts: int, sizes: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The hit rate of each layer (layers, sizes) if the same experts stay in memory.

    They are those that were used most in one trace, `chosen`; another one is `measured`. `sizes`
    counts experts of one layer.
    """
    rates = []
    for before, after in zip(chosen, measured, strict=True):
        order = np.argsort(-np.bincount(before.ravel(), minlength=experts), kind="stable")
        hits = np.cumsum(np.bincount(after.ravel(), minlength=experts)[order]) / after.size
        rates.append(np.concatenate([[0.0], hits])[sizes])
    return np.stack(rates)


def effective_experts(counts: NDArray[Any]) -> NDArray[np.float64]:
    """The effective number of experts (layers,): exp of the entropy of how often each is used."""
    share = counts / counts.sum(axis=-1, keepdims=True)
    logs = np.log(share, where=share > 0, out=np.zeros_like(share))
    entropies: NDArray[np.float64] = -(share * logs).sum(axis=-1)
    return np.exp(entropies)
