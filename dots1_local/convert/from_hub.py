"""Conversion of a checkpoint on the hub: whole, through the hub's cache, or shard by shard."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dots1_local.convert.writer import Output, interrupted_source
from dots1_local.errors import CheckpointError, Dots1Error, UsageError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.partial_file import check_space
from dots1_local.hub import HubCheckpoint
from dots1_local.hub.shard_cache import ShardCache
from dots1_local.hub.shard_order import ShardOrder, order_freely
from dots1_local.hub.shard_supply import ShardSupply
from dots1_local.progress import Progress
from dots1_local.quant.plan import PlannedTensor
from dots1_local.sizes import human_bytes

__all__ = ["fetch_shards", "order_of", "shards_folder"]


def fetch_shards(
    checkpoint: Checkpoint,
    output: Output,
    tensors: Sequence[PlannedTensor],
    low_disk: bool,
    progress: Progress,
) -> ShardSupply | None:
    """Fetch all shards of a checkpoint on the hub; with `low_disk` return their supply instead.

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
        order = order_of(checkpoint, tensors, _held(checkpoint, progress))
        return _plan_low_disk(checkpoint, output, order)
    cache = ShardCache(checkpoint)
    cache.remove_stale()
    _check_disks(cache, output, order_of(checkpoint, tensors).peak(0).nbytes)
    cache.fetch(progress)
    for file in cache.files:
        checkpoint.check_header(cache.path(file))
    return None


def order_of(
    checkpoint: HubCheckpoint, tensors: Iterable[PlannedTensor], held: Iterable[str] = ()
) -> ShardOrder:
    """Order the conversion of tensors for few shards on disk; shards `held` in the cache are free.

    See `order_freely`.
    """
    sizes = {file.name: file.size for file in checkpoint.shard_files if file.name not in set(held)}
    needs = {
        tensor.spec.name: {
            checkpoint.locate(source).file.name for source in tensor.spec.sources
        }.intersection(sizes)
        for tensor in tensors
    }
    return order_freely(needs, sizes)


def shards_folder(output: Output) -> Path:
    """Return the folder beside an output that holds shards while they are needed."""
    return output.target.with_name(f"{output.target.name}.shards")


def _plan_low_disk(checkpoint: HubCheckpoint, output: Output, order: ShardOrder) -> ShardSupply:
    """Fetch one shard ahead if the disk has room; shards in the hub's cache are read there."""
    folder = shards_folder(output) / checkpoint.repo.commit
    moved = checkpoint.with_shards_in(folder, list(order.sizes))
    try:
        _check_room(output, order, 1)
    except Dots1Error:
        _check_room(output, order, 0)
        return ShardSupply(moved, order, folder, ahead=0)
    return ShardSupply(moved, order, folder, ahead=1)


def _check_disks(cache: ShardCache, output: Output, least: int) -> None:
    """Refuse disks that cannot hold missing shards and output; --low-disk needs `least` bytes."""
    if not (missing := cache.missing()):
        return
    check_space(output.path, output.total_bytes, output.partials)
    place, nbytes = cache.path(missing[0]), sum(file.size for file in missing)
    try:
        if place.parent.stat().st_dev == output.path.parent.stat().st_dev:
            what = f"{output.path.name} with the checkpoint"
            check_space(output.path, nbytes + output.total_bytes, output.partials, what=what)
        else:
            check_space(place, nbytes, (), what="the checkpoint")
    except Dots1Error as error:
        advice = f"give --low-disk, which needs {human_bytes(least)} beside the output"
        raise Dots1Error(f"{error}, or {advice}") from None


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
            checkpoint.check_header(cache.path(file))
            held.append(file.name)
            progress(index + 1, len(cache.files), "shards", "checking the hub's cache")
    return held


def _check_room(output: Output, order: ShardOrder, ahead: int) -> None:
    peak = order.peak(ahead)
    shards = (path for path in shards_folder(output).rglob("*") if path.is_file())
    what = f"{output.path.name} with {peak.shards} shards"
    check_space(
        output.path, output.total_bytes + peak.nbytes, [*output.partials, *shards], what=what
    )
