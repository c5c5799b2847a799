"""Shards of a hub checkpoint beside the output: fetched before they are needed, removed after.

A shard is needed from the first tensor that reads from it to the last. Tensors may be written in
any order, so `order_tensors` chooses one in which few shards lie on disk at once: among the tensors
that read from a shard on disk, the next is always the one for which the fewest bytes have to be
fetched. Shards lie in NAME.shards/COMMIT.
"""

import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from threading import Event
from typing import Self

from dots1_local.convert.writer import Output, TensorSlot
from dots1_local.files.partial_file import disk_errors
from dots1_local.hub import HubCheckpoint
from dots1_local.hub.client import HubFile, Stopped

__all__ = [
    "Peak", "ShardOrder", "ShardStep", "ShardSupply", "order_tensors", "remove_shards",
    "shards_folder",
]  # fmt: skip

_COMMIT = re.compile(r"[0-9a-f]{40}")
_GRACE = 1.0  # seconds for a download to notice that it is stopped
_HUB_FILES = ".cache"  # what huggingface_hub keeps in a folder that it fetches to


@dataclass(frozen=True)
class ShardStep:
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

    steps: tuple[ShardStep, ...]
    sizes: Mapping[str, int]

    @cached_property
    def fetches(self) -> tuple[str, ...]:
        """The shards in the order in which they are first needed."""
        steps = (sorted(step.shards) for step in self.steps)
        return tuple(dict.fromkeys(shard for shards in steps for shard in shards))

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
        """Return the order without the tensors in `done`; its peak is no higher."""
        left = (
            ShardStep(tuple(each for each in step.tensors if each not in done), step.shards)
            for step in self.steps
        )
        return ShardOrder(tuple(step for step in left if step.tensors), self.sizes)


def order_tensors(needs: Mapping[str, Set[str]], sizes: Mapping[str, int]) -> ShardOrder:
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


class ShardSupply:
    """Brings the shards that each step needs into `folder`; use it in a `with` statement.

    `ahead` shards are fetched in advance. Leaving the block stops fetching; fetched shards stay.
    `checkpoint` reads these shards from `folder`.
    """

    def __init__(
        self, checkpoint: HubCheckpoint, order: ShardOrder, folder: Path, ahead: int
    ) -> None:
        self.checkpoint, self._order = checkpoint, order
        self._folder, self._ahead = folder, ahead
        self._step_of = {name: at for at, step in enumerate(order.steps) for name in step.tensors}
        self._pool: ThreadPool
        self._stop = Event()
        self._arrivals: dict[str, AsyncResult[None]] = {}
        self._received = dict.fromkeys(order.fetches, 0)  # bytes
        self._what = ""

    def __enter__(self) -> Self:
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_shards(self._folder.parent, besides=self._folder)
            _remove_others(self._folder, next(self._order.on_disk(self._ahead), ()))
        self._pool = ThreadPool(1)  # its thread is a daemon: Ctrl-C waits for no connection
        self._request(0)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        running = next((each for each in self._arrivals.values() if not each.ready()), None)
        if running:
            running.wait(_GRACE)
        self._pool.terminate()

    def without(self, done: Set[str]) -> "ShardSupply":
        """Return a supply for all tensors except `done`."""
        order = self._order.without(done)
        return ShardSupply(self.checkpoint, order, self._folder, self._ahead)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards that are to be fetched."""
        return sum(self._order.sizes[shard] for shard in self._order.fetches)

    @property
    def received(self) -> int:
        """Bytes that have been fetched so far."""
        return sum(self._received.values())

    def in_order(self, slots: Sequence[TensorSlot]) -> list[TensorSlot]:
        """Return the slots in the order in which to convert their tensors."""
        return sorted(slots, key=lambda slot: self._step_of[slot.tensor.spec.name])

    def wait(self, slot: TensorSlot, report: Callable[[str], None]) -> None:
        """Wait for the slot's shards; meanwhile `report` is called with what is fetched.

        Raises:
            Dots1Error: a shard cannot be fetched.
        """
        for shard in self._order.steps[self._step_of[slot.tensor.spec.name]].shards:
            while not self._arrivals[shard].ready():
                report(self._what)
                self._arrivals[shard].wait(0.2)
            self._arrivals[shard].get()

    def finish(self, slot: TensorSlot, close: Callable[[Path], None]) -> None:
        """Close and remove the shards that no later tensor needs."""
        name = slot.tensor.spec.name
        at = self._step_of[name]
        if name != self._order.steps[at].tensors[-1]:
            return
        for shard in self._order.dropped_after(at):
            close(self._folder / shard)
            (self._folder / shard).unlink(missing_ok=True)
        if at + 1 < len(self._order.steps):
            self._request(at + 1)

    def _request(self, step: int) -> None:
        """Queue the shards that the step needs, and those to fetch in advance."""
        count = self._order.needed[step] + self._ahead if self._order.steps else 0
        for shard in self._order.fetches[len(self._arrivals) : count]:
            file = self.checkpoint.repo.files[shard]
            self._arrivals[shard] = self._pool.apply_async(self._fetch, (file,))

    def _fetch(self, file: HubFile) -> None:
        if self._stop.is_set():
            raise Stopped
        self._what = f"fetching {file.name}"
        received = partial(self._received.__setitem__, file.name)
        path = self.checkpoint.repo.fetch(file, self._folder, received=received, stop=self._stop)
        self.checkpoint.check_header(path)
        received(file.size)


def shards_folder(output: Output) -> Path:
    """Return the folder beside an output that holds shards while they are needed."""
    return output.target.with_name(f"{output.target.name}.shards")


def remove_shards(parent: Path, besides: Path | None = None) -> None:
    """Remove the shards of all commits in a folder of shards, or of all but one."""
    for folder in parent.glob("*"):
        if _COMMIT.fullmatch(folder.name) and folder != besides:
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        parent.rmdir()


def _remove_others(folder: Path, shards: Iterable[str]) -> None:
    """Remove all shards but these, and unfinished downloads; other files are not ours."""
    for path in folder.glob("*.safetensors"):
        if path.name not in shards:
            path.unlink()
    for path in (folder / _HUB_FILES).rglob("*.incomplete"):
        path.unlink()
