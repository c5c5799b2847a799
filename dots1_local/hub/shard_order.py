"""The order in which shards are fetched and removed, so that few of them lie on disk at once.

Whatever reads from shards has a name: a tensor of a conversion, or a layer of a pass. A shard is
needed from the first of them that reads from it to the last. Tensors may be converted in any order,
so `order_freely` chooses one in which few shards lie on disk: among the tensors that read from a
shard on disk, the next is always the one for which the fewest bytes have to be fetched. The layers
of a pass keep their order: see `order_as_given`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

__all__ = ["Peak", "ShardOrder", "ShardStep", "order_as_given", "order_freely"]


@dataclass(frozen=True)
class ShardStep:
    """Tensors or layers that read from the same shards, handled while these lie on disk."""

    names: tuple[str, ...]
    shards: frozenset[str]


@dataclass(frozen=True)
class Peak:
    """The most shards that lie on disk at once, and the most bytes."""

    shards: int
    nbytes: int


@dataclass(frozen=True)
class ShardOrder:
    """All steps of a conversion or pass; `sizes` are the shards' bytes."""

    steps: tuple[ShardStep, ...]
    sizes: Mapping[str, int]

    @cached_property
    def fetches(self) -> tuple[str, ...]:
        """The shards in the order in which they are first needed."""
        steps = (sorted(step.shards) for step in self.steps)
        return tuple(dict.fromkeys(shard for shards in steps for shard in shards))

    @property
    def nbytes(self) -> int:
        """Bytes of all shards that are fetched."""
        return sum(self.sizes[shard] for shard in self.fetches)

    @cached_property
    def _last_use(self) -> dict[str, int]:
        return {shard: at for at, step in enumerate(self.steps) for shard in step.shards}

    @cached_property
    def needed(self) -> tuple[int, ...]:
        """How many of `fetches` each step and those before it need."""
        seen: set[str] = set()
        return tuple(len(seen := seen | step.shards) for step in self.steps)

    def dropped_after(self, step: int) -> list[str]:
        """Return the shards that no later step needs."""
        return [each for each in sorted(self.steps[step].shards) if self._last_use[each] == step]

    def on_disk(self, ahead: int) -> Iterator[set[str]]:
        """Yield the shards that may lie on disk in each step, with `ahead` fetched in advance."""
        there: set[str] = set()
        for at, step in enumerate(self.steps):
            there |= step.shards
            yield there | set(islice(self.fetches, self.needed[at], self.needed[at] + ahead))
            there -= set(self.dropped_after(at))

    def peak(self, ahead: int = 1) -> Peak:
        """Return the most that lies on disk at once, with `ahead` shards fetched in advance."""
        moments = list(self.on_disk(ahead))
        return Peak(
            max(map(len, moments), default=0),
            max((sum(self.sizes[shard] for shard in there) for there in moments), default=0),
        )

    def without(self, done: Set[str]) -> "ShardOrder":
        """Return the order without the names in `done`; its peak is no higher."""
        left = (
            ShardStep(tuple(each for each in step.names if each not in done), step.shards)
            for step in self.steps
        )
        return ShardOrder(tuple(step for step in left if step.names), self.sizes)


def order_as_given(needs: Mapping[str, Set[str]], sizes: Mapping[str, int]) -> ShardOrder:
    """Keep the order of `needs`, which has the shards that each name needs."""
    steps = (ShardStep((name,), frozenset(shards)) for name, shards in needs.items())
    return ShardOrder(tuple(steps), sizes)


def order_freely(needs: Mapping[str, Set[str]], sizes: Mapping[str, int]) -> ShardOrder:
    """Order tensors, given in file order with the shards that each needs.

    If each shard shares tensors with the next, they form a chain, which is best walked from an end.
    So there are two walks, one from the first tensor and one from where that walk ended.
    """
    grouped: dict[frozenset[str], list[str]] = defaultdict(list)
    for tensor, shards in needs.items():
        grouped[frozenset(shards)].append(tensor)
    steps = [ShardStep(tuple(tensors), shards) for shards, tensors in grouped.items()]

    def order(walk: Iterable[int]) -> ShardOrder:
        return ShardOrder(tuple(steps[index] for index in walk), sizes)

    def peaks(walk: Iterable[int]) -> tuple[int, int]:
        return order(walk).peak(1).nbytes, order(walk).peak(0).nbytes

    walked: dict[int, None] = {}
    for start in range(len(steps)):
        if start not in walked:
            there = _walk(steps, sizes, start)
            back = _walk(steps, sizes, there[-1])
            walked |= dict.fromkeys(min(there, back, key=peaks))
    return order(walked)


def _walk(steps: Sequence[ShardStep], sizes: Mapping[str, int], start: int) -> list[int]:
    """Return the indices of all steps that `start` reaches over shared shards, as walked."""
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
