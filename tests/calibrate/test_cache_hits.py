"""Hits of caches, against simulations that know nothing of stack distances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dots1_local.calibrate.cache_hits import (
    effective_experts,
    lru_hit_rates,
    stack_distances,
    static_hit_rates,
)

Trace = NDArray[np.uint8]
Hits = NDArray[np.bool_]


def random_trace(seed: int, layers: int, tokens: int, experts: int, used: int) -> Trace:
    """Tokens that prefer some experts, and those of the token before."""
    random = np.random.default_rng(seed)
    liking = random.normal(size=(layers, 1, experts)) + np.zeros((layers, tokens, experts))
    noise = random.gumbel(size=liking.shape)
    noise[:, 1:] += 0.5 * noise[:, :-1]
    return np.argsort(liking + noise, axis=-1)[..., :used].astype(np.uint8)


def simulated(trace: Trace, size: int, *, as_llama_cpp: bool = False) -> Hits:
    """Whether a list of at most `size` experts, the last used ones at its end, has each choice.

    The experts of a token join the list in the order of the trace. llama.cpp lets hits come before
    misses, and misses in ascending order.
    """
    hits = np.zeros(trace.shape, bool)
    held: list[tuple[int, int]] = []
    for token in range(trace.shape[1]):
        for layer in range(trace.shape[0]):
            joining = [(layer, expert) for expert in trace[layer, token].tolist()]
            present = [each in held for each in joining]
            hits[layer, token] = present
            if as_llama_cpp:
                inside = [each for each in joining if each in held]
                joining = [*inside, *sorted(set(joining) - set(inside))]
            held = ([each for each in held if each not in joining] + joining)[-size:]
    return hits


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_choice_hits_as_in_a_simulation(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 9))
    used, layers = data.draw(st.integers(1, experts)), data.draw(st.integers(1, 4))
    trace = random_trace(data.draw(st.integers(0, 99)), layers, 25, experts, used)
    distances = stack_distances(trace, experts)
    for size in range(used, layers * experts + 1):
        np.testing.assert_array_equal(distances < size, simulated(trace, size))


@pytest.mark.parametrize("size", [16, 48, 96])
def test_llama_cpps_order_hits_as_often(size: int) -> None:
    trace = random_trace(1, 4, 400, 32, 4)
    theirs = simulated(trace, size, as_llama_cpp=True).mean()
    assert (stack_distances(trace, 32) < size).mean() == pytest.approx(theirs, abs=0.003)
    assert 0.05 < theirs < 0.99


def test_distances_by_hand() -> None:
    trace = np.array([[[0, 1], [0, 1], [2, 0]], [[3, 2], [1, 0], [3, 2]]], np.uint8)
    first = 8  # of 2 layers with 4 experts
    # Last uses, latest first, before token 1: 1:2 1:3 0:1 0:0; then 0:1 0:0 1:2 1:3; before token
    # 2: 1:0 1:1 0:1 0:0 1:2 1:3; then 0:0 0:2 1:0 1:1 0:1 1:2 1:3.
    expected = [[[first, first], [3, 2], [first, 3]], [[first, first], [first, first], [6, 5]]]
    assert stack_distances(trace, 4).tolist() == expected


def test_rates_of_layers_and_sizes() -> None:
    distances = np.array([[[0, 5], [1, 9]], [[9, 9], [2, 3]]], np.int32)
    rates = lru_hit_rates(distances, np.array([1, 2, 6]), used=2)
    assert rates.tolist() == [[0.0, 0.5, 0.75], [0.0, 0.0, 0.5]]


def test_a_hot_set_is_chosen_on_other_tokens() -> None:
    before = np.array([[[3], [3], [1]]], np.uint8)
    after = np.array([[[1], [3], [3], [0]]], np.uint8)
    rates = static_hit_rates(before, after, 4, np.array([1, 2, 4]))
    assert rates.tolist() == [[0.5, 0.75, 1.0]]


def test_effective_numbers_of_experts() -> None:
    counts = np.array([[5, 5, 5, 5], [8, 0, 0, 0], [4, 4, 0, 0]])
    np.testing.assert_allclose(effective_experts(counts), [4, 1, 2])
