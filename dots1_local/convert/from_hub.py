"""Conversion of a checkpoint on the hub: whole, through the hub's cache, or shard by shard.

Shard by shard (`--low-disk`), shards lie in NAME.shards/COMMIT beside the output: they are fetched
before they are needed and removed after. There are never more of them than the order's peak.
"""

import re
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from dots1_local.convert.shard_order import ShardOrder, order_tensors
from dots1_local.convert.writer import Output, Slot, interrupted_source
from dots1_local.errors import CheckpointError, Dots1Error, UsageError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.partial_file import check_space, disk_errors
from dots1_local.hub import HubCheckpoint
from dots1_local.hub.client import HubFile, Stopped
from dots1_local.hub.shards import ShardCache
from dots1_local.progress import Progress
from dots1_local.quant.plan import PlannedTensor
from dots1_local.sizes import human_bytes

__all__ = ["LowDisk", "ShardSupply", "fetch_shards", "order_of", "remove_shards"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_GRACE = 1.0  # seconds for the fetching thread to notice that it is stopped
_HUB_FILES = ".cache"  # what huggingface_hub keeps in a folder that it fetches to


@dataclass(frozen=True)
class LowDisk:
    """A plan by which shards come and go; `checkpoint` reads them from where they will lie."""

    checkpoint: HubCheckpoint
    order: ShardOrder
    output: Output
    ahead: int

    def supply(self, done: Set[str]) -> "ShardSupply":
        """Return the supply of the shards that tensors other than `done` need."""
        folder = _working_folder(self.output, self.checkpoint)
        return ShardSupply(self.checkpoint, self.order.without(done), folder, self.ahead)


def fetch_shards(
    checkpoint: Checkpoint,
    output: Output,
    tensors: Sequence[PlannedTensor],
    low_disk: bool,
    progress: Progress,
) -> LowDisk | None:
    """Fetch all shards of a checkpoint on the hub; with `low_disk` only plan how they come and go.

    Raises:
        CheckpointError: a shard is refused or arrives damaged, the hub cannot be reached, or the
            revision names another commit than when this output was begun.
        Dots1Error: a disk is too small.
        UsageError: `low_disk` is given for a folder.
        OSError: the hub's cache cannot be used.
    """
    if not isinstance(checkpoint, HubCheckpoint):
        if low_disk:
            raise UsageError(f"{checkpoint.source} is on the disk already; leave --low-disk out")
        return None
    _refuse_other_commit(checkpoint, output)
    if low_disk:
        return _plan_low_disk(checkpoint, output, tensors, progress)
    _fetch_all(checkpoint, output, tensors, progress)
    return None


def order_of(
    checkpoint: HubCheckpoint, tensors: Iterable[PlannedTensor], held: Iterable[str] = ()
) -> ShardOrder:
    """Order the conversion of tensors for few shards on disk; shards `held` in the cache are free.

    See `order_tensors`.
    """
    sizes = {file.name: file.size for file in checkpoint.shard_files if file.name not in set(held)}
    needs = {
        tensor.spec.name: {
            checkpoint.locate(source).file.name for source in tensor.spec.sources
        }.intersection(sizes)
        for tensor in tensors
    }
    return order_tensors(needs, sizes)


def _plan_low_disk(
    checkpoint: HubCheckpoint,
    output: Output,
    tensors: Sequence[PlannedTensor],
    progress: Progress,
) -> LowDisk:
    """One shard is fetched ahead if the disk has room; those in the hub's cache are read there."""
    order = order_of(checkpoint, tensors, _held(checkpoint, progress))
    folder = _working_folder(output, checkpoint)
    moved = checkpoint.with_shards_in(folder, list(order.sizes))
    ahead = 1
    try:
        _check_room(output, order, ahead)
    except Dots1Error:
        ahead = 0
        _check_room(output, order, ahead)
    return LowDisk(moved, order, output, ahead)


def _fetch_all(
    checkpoint: HubCheckpoint,
    output: Output,
    tensors: Sequence[PlannedTensor],
    progress: Progress,
) -> None:
    """Fetch every shard into the hub's cache, after a look at the disks."""
    cache = ShardCache(checkpoint)
    cache.remove_stale()
    if missing := cache.missing():
        check_space(output.path, output.total_bytes, output.partials)
        place, nbytes = cache.path(missing[0]), sum(file.size for file in missing)
        same_disk = place.parent.stat().st_dev == output.path.parent.stat().st_dev
        try:
            if same_disk:
                what, nbytes = (
                    f"{output.path.name} with the checkpoint",
                    nbytes + output.total_bytes,
                )
                check_space(output.path, nbytes, output.partials, what=what)
            else:
                check_space(place, nbytes, (), what="the checkpoint")
        except Dots1Error as error:
            peak = human_bytes(order_of(checkpoint, tensors).peak(0).nbytes)
            raise Dots1Error(
                f"{error}, or give --low-disk, which needs {peak} beside the output"
            ) from None
    cache.fetch(progress)
    for file in cache.files:
        checkpoint.check_start(cache.path(file))


def _refuse_other_commit(checkpoint: HubCheckpoint, output: Output) -> None:
    """Refuse a branch that moved since a run was interrupted; that run's work would be lost."""
    begun, repo = interrupted_source(output), checkpoint.repo
    name, _, commit = begun.partition("@")
    if name == repo.name and commit != repo.commit:
        raise CheckpointError(
            f"{output.target} was begun from {name} at commit {commit[:12]}, and {repo.revision} "
            f"is {repo.commit[:12]} now: resume with --revision {commit}, or remove "
            f"{output.target}.journal to begin again"
        )


def _held(checkpoint: HubCheckpoint, progress: Progress) -> list[str]:
    cache, held = ShardCache(checkpoint), []
    for index, file in enumerate(cache.files):
        if cache.holds(file):
            checkpoint.check_start(cache.path(file))
            held.append(file.name)
            progress(index + 1, len(cache.files), "shards", "checking the hub's cache")
    return held


def _check_room(output: Output, order: ShardOrder, ahead: int) -> None:
    peak = order.peak(ahead)
    shards = (path for path in _folder(output).rglob("*") if path.is_file())
    what = f"{output.path.name} with {peak.shards} shards"
    check_space(
        output.path, output.total_bytes + peak.nbytes, [*output.partials, *shards], what=what
    )


class ShardSupply:
    """Brings the shards that each step needs; use it in a `with` statement.

    `ahead` shards are fetched in advance. Leaving the block stops fetching; fetched shards stay.
    """

    def __init__(
        self, checkpoint: HubCheckpoint, order: ShardOrder, folder: Path, ahead: int
    ) -> None:
        self._checkpoint, self._order = checkpoint, order
        self._folder, self._ahead = folder, ahead
        self._step_of = {name: at for at, step in enumerate(order.steps) for name in step.tensors}
        self._changed = threading.Condition()
        self._allowed = 0  # how many of the order's fetches
        self._present: set[str] = set()
        self._received = dict.fromkeys(order.fetches, 0)  # bytes
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._what = ""
        self._thread = threading.Thread(target=self._work, name="fetch", daemon=True)

    def __enter__(self) -> Self:
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            _clear(self._folder.parent, besides=self._folder)
            _keep(self._folder, next(self._order.on_disk(self._ahead), ()))
        self._allow(0)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(_GRACE)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards that are to be fetched."""
        return sum(self._order.sizes[shard] for shard in self._order.fetches)

    @property
    def received(self) -> int:
        """Bytes that have been fetched so far."""
        return sum(self._received.values())

    def in_order(self, slots: Sequence[Slot]) -> list[Slot]:
        """Return the slots in the order in which to convert their tensors."""
        return sorted(slots, key=lambda slot: self._step_of[slot.tensor.spec.name])

    def wait(self, slot: Slot, report: Callable[[str], None]) -> None:
        """Wait for the slot's shards; meanwhile `report` is called with what is fetched.

        Raises:
            Dots1Error: a shard cannot be fetched.
        """
        needed = self._order.steps[self._step_of[slot.tensor.spec.name]].shards
        with self._changed:
            while not needed <= self._present:
                if self._error is not None:
                    raise self._error
                report(self._what)
                self._changed.wait(0.2)

    def finish(self, slot: Slot, close: Callable[[Path], None]) -> None:
        """Close and remove the shards that no later tensor needs."""
        name = slot.tensor.spec.name
        at = self._step_of[name]
        if name != self._order.steps[at].tensors[-1]:
            return
        for shard in self._order.dropped_after(at):
            close(self._folder / shard)
            (self._folder / shard).unlink(missing_ok=True)
        if at + 1 < len(self._order.steps):
            self._allow(at + 1)

    def _allow(self, step: int) -> None:
        with self._changed:
            if self._order.steps:
                self._allowed = self._order.needed_until(step) + self._ahead
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            for index, shard in enumerate(self._order.fetches):
                with self._changed:
                    while index >= self._allowed and not self._stop.is_set():
                        self._changed.wait()
                self._fetch(self._checkpoint.repo.file(shard))
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _fetch(self, file: HubFile) -> None:
        if self._stop.is_set():
            raise Stopped
        self._what = f"fetching {file.name}"
        received = partial(self._received.__setitem__, file.name)
        path = self._checkpoint.repo.fetch(file, self._folder, received=received, stop=self._stop)
        self._checkpoint.check_start(path)
        received(file.size)
        with self._changed:
            self._present.add(file.name)
            self._changed.notify_all()


def remove_shards(output: Output) -> None:
    """Remove every shard that conversions to this output have left."""
    _clear(_folder(output))
    with suppress(OSError):
        _folder(output).rmdir()


def _folder(output: Output) -> Path:
    return output.target.with_name(output.target.name + ".shards")


def _working_folder(output: Output, checkpoint: HubCheckpoint) -> Path:
    """Where the shards of one commit lie while they are needed."""
    return _folder(output) / checkpoint.repo.commit


def _clear(parent: Path, besides: Path | None = None) -> None:
    """Remove the shards of all commits, or of all but one."""
    for folder in parent.glob("*"):
        if _COMMIT.fullmatch(folder.name) and folder != besides:
            _keep(folder, ())
            shutil.rmtree(folder / _HUB_FILES, ignore_errors=True)
            with suppress(OSError):
                folder.rmdir()


def _keep(folder: Path, shards: Iterable[str]) -> None:
    """Remove all shards but these, and unfinished downloads; other files are not ours."""
    for path in folder.glob("*.safetensors"):
        if path.name not in shards:
            path.unlink()
    for path in (folder / _HUB_FILES).rglob("*.incomplete"):
        path.unlink()
