"""The order of conversion in which few shards lie on disk at once, and how many those are.

A shard is needed from the first tensor that reads from it to the last. Tensors may be written in
any order. So of those that read from a shard on disk, the next is always the one for which the
fewest bytes have to be fetched.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

__all__ = ["Peak", "ShardOrder", "Step", "order_tensors"]


@dataclass(frozen=True)
class Step:
    """Tensors that read from the same shards, converted while these lie on disk."""

    tensors: tuple[str, ...]
    shards: frozenset[str]


@dataclass(frozen=True)
class Peak:
    """The most shards that lie on disk at once, and the most bytes."""

    shards: int
    nbytes: int


@dataclass(frozen=True)
class ShardOrder:
    """All steps of a conversion; `sizes` are the shards' bytes."""

    steps: tuple[Step, ...]
    sizes: Mapping[str, int]

    @cached_property
    def _last(self) -> dict[str, int]:
        return {shard: at for at, step in enumerate(self.steps) for shard in step.shards}

    @cached_property
    def fetches(self) -> tuple[str, ...]:
        """The shards in the order in which they are first needed."""
        steps = (sorted(step.shards) for step in self.steps)
        return tuple(dict.fromkeys(shard for shards in steps for shard in shards))

    def needed_until(self, step: int) -> int:
        """How many of `fetches` the steps up to this one need."""
        return self._counts[step]

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        seen: set[str] = set()
        counts = []
        for step in self.steps:
            seen |= step.shards
            counts.append(len(seen))
        return tuple(counts)

    def dropped_after(self, step: int) -> list[str]:
        """The shards that no later step needs."""
        return [each for each in sorted(self.steps[step].shards) if self._last[each] == step]

    def on_disk(self, ahead: int) -> Iterator[set[str]]:
        """The shards that may lie on disk during each step, with `ahead` fetched in advance."""
        there: set[str] = set()
        for at, step in enumerate(self.steps):
            there |= step.shards
            yield there | set(islice(self.fetches, self._counts[at], self._counts[at] + ahead))
            there -= set(self.dropped_after(at))

    def peak(self, ahead: int = 1) -> Peak:
        """The most that lies on disk at once, with `ahead` shards fetched in advance."""
        moments = list(self.on_disk(ahead))
        return Peak(
            max(map(len, moments), default=0),
            max((sum(self.sizes[shard] for shard in there) for there in moments), default=0),
        )

    def without(self, done: Set[str]) -> "ShardOrder":
        """What is left once the tensors in `done` are converted; its peak is no higher."""
        left = (
            Step(tuple(each for each in step.tensors if each not in done), step.shards)
            for step in self.steps
        )
        return ShardOrder(tuple(step for step in left if step.tensors), self.sizes)


def order_tensors(needs: Mapping[str, Set[str]], sizes: Mapping[str, int]) -> ShardOrder:
    """The order for tensors, given in file order with the shards that each needs.

    Where each shard shares tensors with the next, they form a chain, which is best walked from an
    end. So there are two walks, one from the first tensor and one from where that walk ended.
    """
    grouped: dict[frozenset[str], list[str]] = defaultdict(list)
    for tensor, shards in needs.items():
        grouped[frozenset(shards)].append(tensor)
    steps = [Step(tuple(tensors), shards) for shards, tensors in grouped.items()]
    walked: dict[int, None] = {}
    for start in range(len(steps)):
        if start not in walked:
            there = _walk(steps, sizes, start)
            back = _walk(steps, sizes, there[-1])
            better = min(there, back, key=lambda walk: _peak_of(steps, sizes, walk))
            walked |= dict.fromkeys(better)
    return ShardOrder(tuple(steps[index] for index in walked), sizes)


def _walk(steps: Sequence[Step], sizes: Mapping[str, int], start: int) -> list[int]:
    """Indices of all steps that `start` reaches over shared shards, in the order of the walk."""
    readers: dict[str, list[int]] = defaultdict(list)
    for index, step in enumerate(steps):
        for shard in step.shards:
            readers[shard].append(index)
    missing = [sum(sizes[shard] for shard in step.shards) for step in steps]
    fetched: set[str] = set()
    walk: dict[int, None] = {}
    reachable = {start}
    while reachable:
        at = min(reachable, key=lambda index: (missing[index], index))
        walk[at] = None
        for shard in steps[at].shards - fetched:
            for reader in readers[shard]:
                missing[reader] -= sizes[shard]
            reachable.update(readers[shard])
        fetched |= steps[at].shards
        reachable -= walk.keys()
    return list(walk)


def _peak_of(
    steps: Sequence[Step], sizes: Mapping[str, int], walk: Sequence[int]
) -> tuple[int, int]:
    order = ShardOrder(tuple(steps[index] for index in walk), sizes)
    return order.peak(1).nbytes, order.peak(0).nbytes
