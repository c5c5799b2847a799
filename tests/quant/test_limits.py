"""Choices within several limits, against all choices there are."""

from itertools import product

import numpy as np
import pytest

from dots1_local.quant.limits import Options, Pick, least_loss


def options(
    seed: int,
    *,
    tensors: int = 5,
    kinds: int = 3,
    limits: int = 3,
    room: float = 0.4,
) -> Options:
    """Types with more bytes and less loss, on two places with bytes of their own.

    The third limit is seconds, of which the second place takes four times as many; the fourth is
    bytes on both places together.
    """
    random = np.random.default_rng(seed)
    bits = np.sort(random.uniform(2, 8, kinds))
    nbytes = random.uniform(0.5, 2, tensors)[:, None] * bits
    loss = random.uniform(0.5, 3, tensors)[:, None] * 2.0**-bits
    loss = loss * random.uniform(0.8, 1.2, loss.shape)
    loss[:, 1:][random.random((tensors, kinds - 1)) < 0.1] = np.inf
    costs = np.zeros((4, 2, tensors, kinds))
    costs[0, 0] = costs[1, 1] = costs[3, 0] = costs[3, 1] = nbytes
    for place in (0, 1):
        costs[2, place] = nbytes * random.uniform(0.5, 2, kinds) * (1 + 3 * place)
    least, most = costs.min((1, 3)).sum(1), costs.max((1, 3)).sum(1)
    most = least + (most - least) * room * random.uniform(0.5, 1.2, 4)
    return Options(np.stack([loss, loss]), costs[:limits], most[:limits])


def allows(given: Options, pick: Pick) -> bool:
    """Whether a choice keeps all limits."""
    spent = given.costs[:, pick.place, np.arange(len(pick.kind)), pick.kind].sum(1)
    return bool((spent <= given.allowed).all())


def loss_of(given: Options, pick: Pick) -> float:
    """The sum of the losses of all tensors."""
    return float(given.loss[pick.place, np.arange(len(pick.kind)), pick.kind].sum())


def least_of_all(given: Options) -> float | None:
    """The least loss, by trying everything."""
    places, tensors, kinds = given.loss.shape
    picks = (
        Pick(np.array(place), np.array(kind))
        for place in product(range(places), repeat=tensors)
        for kind in product(range(kinds), repeat=tensors)
    )
    return min((loss_of(given, pick) for pick in picks if allows(given, pick)), default=None)


@pytest.mark.parametrize("limits", [1, 2, 3, 4])
@pytest.mark.parametrize("room", [0.15, 0.3, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_best_of_all_choices(seed: int, room: float, limits: int) -> None:
    given = options(seed, limits=limits, room=room)
    found, expected = least_loss(given), least_of_all(given)
    assert (found is None) == (expected is None)
    if found is not None:
        assert allows(given, found)
        assert loss_of(given, found) == pytest.approx(expected, rel=1e-9)


def test_a_model_of_many_tensors_is_close_to_the_bound() -> None:
    """The loss without whole numbers, which no choice can undercut, by the prices themselves."""
    given = options(1, tensors=240, kinds=8)
    found = least_loss(given)
    assert found is not None
    assert allows(given, found)
    prices = np.linspace(0, 60, 61)
    bound = max(
        (given.loss + np.tensordot(np.array([a, b, 0]) / given.most, given.costs, 1))
        .min((0, 2))
        .sum()
        - a
        - b
        for a in prices
        for b in prices
    )
    assert loss_of(given, found) < 1.02 * bound


def test_nothing_is_chosen_twice_differently() -> None:
    first, second = (least_loss(options(5, tensors=60, room=0.6)) for _ in range(2))
    assert first is not None
    assert second is not None
    assert np.array_equal(first.place, second.place)
    assert np.array_equal(first.kind, second.kind)


def test_limits_that_nothing_keeps() -> None:
    given = options(0)
    impossible = Options(given.loss, given.costs, np.zeros(3))
    assert least_loss(impossible) is None
