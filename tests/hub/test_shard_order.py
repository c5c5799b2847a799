"""Orders of tensors that keep few shards on disk, also for the geometry of dots.llm1."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from dots1_local.architecture import inventory
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.hub.pass_shards import backward_steps, forward_steps, step_tensors
from dots1_local.hub.shard_order import Peak, ShardOrder, order_as_given, order_freely
from tools.make_wide import published_config, write_checkpoint

GB = 10**9


def at_once(order: ShardOrder, ahead: int) -> int:
    """Count the most shards between their first and last use, from the steps alone."""
    fetched: list[str] = []
    for step in order.steps:
        fetched += sorted(step.shards - set(fetched))
    most = 0
    for at, step in enumerate(order.steps):
        needed = set().union(*(each.shards for each in order.steps[: at + 1]))
        later = set().union(*(each.shards for each in order.steps[at + 1 :]))
        early = set(fetched[len(needed) : len(needed) + ahead])
        most = max(most, len((needed & later) | step.shards | early))
    return most


def chain(links: Sequence[tuple[str, ...]]) -> dict[str, set[str]]:
    return {f"tensor {index}": set(shards) for index, shards in enumerate(links)}


def test_every_tensor_is_converted_once_and_every_shard_kept_until_its_last_use() -> None:
    needs = chain([("a",), ("c", "d"), ("a", "b"), ("d",), ("b", "c"), ("b",)])
    order = order_freely(needs, dict.fromkeys("abcd", 10))
    assert sorted(t for step in order.steps for t in step.names) == sorted(needs)
    assert all(needs[tensor] == step.shards for step in order.steps for tensor in step.names)
    assert order.fetches == ("a", "b", "c", "d")
    dropped = [shard for at in range(len(order.steps)) for shard in order.dropped_after(at)]
    assert dropped == ["a", "b", "c", "d"]
    assert order.peak(0) == Peak(2, 20)
    assert order.peak(1) == Peak(3, 30)


@pytest.mark.parametrize("first", [0, 5, 9])
def test_a_chain_of_shards_is_walked_from_an_end(first: int) -> None:
    links: list[tuple[str, ...]] = [(f"{at}", f"{at + 1}") for at in range(10)]
    links = [links[first], *links[:first], *links[first + 1 :]]
    order = order_freely(chain(links), {str(at): 1 for at in range(11)})
    assert order.peak(0).shards == 2
    assert all(len(a.shards & b.shards) == 1 for a, b in pairwise(order.steps))


def test_chains_that_share_no_shard_are_walked_one_after_the_other() -> None:
    links = [("a", "b"), ("x", "y"), ("b", "c"), ("y", "z")]
    order = order_freely(chain(links), dict.fromkeys("abcxyz", 1))
    assert order.peak(0) == Peak(2, 2)


def test_the_rest_of_an_order_needs_no_more_than_the_whole() -> None:
    needs = chain([("a",), ("a", "b"), ("b",), ("b", "c"), ("c",), ("c", "d")])
    order = order_freely(needs, {"a": 3, "b": 9, "c": 4, "d": 1})
    names = [tensor for step in order.steps for tensor in step.names]
    for count in range(len(names) + 1):
        left = order.without(set(names[:count]))
        assert left.peak(0).nbytes <= order.peak(0).nbytes
        assert [tensor for step in left.steps for tensor in step.names] == names[count:]
    assert order.without(set(names)).peak() == Peak(0, 0)


def test_a_pass_keeps_its_order() -> None:
    needs = chain([("a",), ("a", "b"), ("c",), ("b",)])
    order = order_as_given(needs, {"a": 1, "b": 2, "c": 4})
    assert [name for step in order.steps for name in step.names] == list(needs)
    assert [order.dropped_after(at) for at in range(4)] == [[], ["a"], ["c"], ["b"]]
    assert (order.peak(0), order.nbytes) == (Peak(2, 6), 7)
    back = order_as_given(dict(reversed(needs.items())), order.sizes)
    assert back.fetches == ("b", "c", "a")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """dots.llm1's own geometry in 60 shards of 4.8 GB, in layer order."""
    folder = tmp_path_factory.mktemp("full")
    return Checkpoint.open(write_checkpoint(folder, published_config(), 60, headers_only=True))


def test_dots_llm1_needs_two_shards_at_once(full: Checkpoint) -> None:
    needs = {
        spec.name: {full.locate(source).file.name for source in spec.sources}
        for spec in inventory(full.config)
    }
    sizes = {shard.name: shard.stat().st_size for shard in full.shards}
    assert sum(sizes.values()) > 285 * GB
    order = order_freely(needs, sizes)
    assert (at_once(order, 0), at_once(order, 1)) == (2, 3)
    assert order.peak(0).shards == 2
    assert order.peak(1).shards == 3
    assert 9.5 * GB < order.peak(0).nbytes < 9.6 * GB
    assert 14.2 * GB < order.peak(1).nbytes < 14.4 * GB


@pytest.mark.parametrize("walk", [forward_steps, backward_steps])
def test_a_pass_over_dots_llm1_needs_three_shards_at_once(
    full: Checkpoint, walk: Callable[[int], list[str]]
) -> None:
    """A layer is in two shards; the first shard, with embedding and head, stays all the time."""
    needs = {
        step: {full.locate(name).file.name for name in step_tensors(full.config)[step]}
        for step in walk(full.config.num_hidden_layers)
    }
    sizes = {shard.name: shard.stat().st_size for shard in full.shards}
    order = order_as_given(needs, sizes)
    assert (at_once(order, 0), at_once(order, 1)) == (3, 4)
    assert order.peak(1).shards == 4
    assert order.nbytes == sum(sizes.values())


def test_layers_that_are_sorted_by_name(full: Checkpoint) -> None:
    """Sorted by name (1, 10, 11, ..., 2, 20), file order would keep 14 shards on disk."""
    sources = sorted(source for spec in inventory(full.config) for source in spec.sources)
    share = sum(full.locate(source).nbytes for source in sources) / 60
    shard_of, start = {}, 0
    for source in sources:
        shard_of[source] = f"{int(start // share):02}"
        start += full.locate(source).nbytes
    needs = {spec.name: {shard_of[s] for s in spec.sources} for spec in inventory(full.config)}
    sizes = dict.fromkeys(shard_of.values(), 4_800_000_000)
    assert len(sizes) == 60
    order = order_freely(needs, sizes)
    assert (at_once(order, 0), at_once(order, 1)) == (2, 3)
    assert order.peak(1) == Peak(3, 3 * 4_800_000_000)
