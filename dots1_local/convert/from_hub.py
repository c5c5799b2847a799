"""Conversion of a checkpoint on the hub: whole, through its cache, or shard by shard."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from dots1_local.convert.shard_order import ShardOrder
from dots1_local.convert.shard_supply import ShardSupply, order_of, working_folder
from dots1_local.convert.writer import Output, interrupted_source
from dots1_local.errors import CheckpointError, Dots1Error, UsageError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.partial_file import check_space
from dots1_local.hub import HubCheckpoint
from dots1_local.hub.shards import ShardCache
from dots1_local.progress import Progress
from dots1_local.quant.plan import PlannedTensor
from dots1_local.sizes import human_bytes

__all__ = ["LowDisk", "provide_shards"]


@dataclass(frozen=True)
class LowDisk:
    """A plan by which shards come and go; `checkpoint` reads them from where they will lie."""

    checkpoint: HubCheckpoint
    order: ShardOrder
    output: Output
    ahead: int

    def supply(self, done: Set[str]) -> ShardSupply:
        """Brings the shards that tensors other than `done` need."""
        folder = working_folder(self.output, self.checkpoint)
        return ShardSupply(self.checkpoint, self.order.without(done), folder, self.ahead)


def provide_shards(
    checkpoint: Checkpoint,
    output: Output,
    tensors: Sequence[PlannedTensor],
    low_disk: bool,
    progress: Progress,
) -> LowDisk | None:
    """Fetch all shards; or with `low_disk` fetch none, and plan how they come and go.

    Raises:
        CheckpointError: a shard is refused or comes damaged, the hub cannot be reached, or the
            revision names another commit than when this output was begun.
        Dots1Error: a disk is too small.
        UsageError: `low_disk` for a folder.
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


def _plan_low_disk(
    checkpoint: HubCheckpoint,
    output: Output,
    tensors: Sequence[PlannedTensor],
    progress: Progress,
) -> LowDisk:
    """One shard is fetched ahead if the disk has room; those in the hub's cache are read there."""
    held = _held(checkpoint, progress)
    order = order_of(checkpoint, tensors, held)
    folder = working_folder(output, checkpoint)
    moved = checkpoint.with_shards_in(folder, list(order.sizes))
    ahead = 1
    try:
        _check_room(output, order, checkpoint, ahead)
    except Dots1Error:
        ahead = 0
        _check_room(output, order, checkpoint, ahead)
    return LowDisk(moved, order, output, ahead)


def _fetch_all(
    checkpoint: HubCheckpoint,
    output: Output,
    tensors: Sequence[PlannedTensor],
    progress: Progress,
) -> None:
    """Fetch every shard into the hub's cache, after a look at the disks."""
    cache = ShardCache(checkpoint)
    if missing := cache.missing():
        nbytes = sum(file.size for file in missing)
        parts = cache.working_files()
        place = cache.path(missing[0])
        check_space(output.path, output.total_bytes, output.partials)
        what = "the checkpoint"
        if place.parent.stat().st_dev == output.path.parent.stat().st_dev:
            place = output.path
            nbytes += output.total_bytes
            parts += output.partials
            what = f"{output.path.name} with the checkpoint"
        try:
            check_space(place, nbytes, parts, what=what)
        except Dots1Error as error:
            peak = human_bytes(order_of(checkpoint, tensors).peak(0).nbytes)
            raise Dots1Error(
                f"{error}, or give --low-disk, which needs {peak} beside the output"
            ) from None
    cache.fetch(progress)
    for file in cache.files:
        checkpoint.check_start(cache.path(file))


def _refuse_other_commit(checkpoint: HubCheckpoint, output: Output) -> None:
    """A branch that moved since a run was interrupted would throw that run's work away."""
    begun, repo = interrupted_source(output), checkpoint.repo
    name, _, commit = begun.partition("@")
    if name == repo.name and commit != repo.commit:
        raise CheckpointError(
            f"{output.target} was begun from {name} at commit {commit[:12]}, and {repo.revision} "
            f"is {repo.commit[:12]} now: go on with --revision {commit}, or remove "
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


def _check_room(output: Output, order: ShardOrder, checkpoint: HubCheckpoint, ahead: int) -> None:
    peak = order.peak(ahead)
    working = [*output.partials, *working_folder(output, checkpoint).parent.glob("*/*")]
    what = f"{output.path.name} with {peak.shards} shards"
    check_space(output.path, output.total_bytes + peak.nbytes, working, what=what)
