"""Conversion of a checkpoint on the hub: whole, through the hub's cache, or shard by shard."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dots1_local.convert.output import Output
from dots1_local.convert.writer import interrupted_source
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.partial_file import DiskNeed
from dots1_local.hub import HubCheckpoint, on_hub
from dots1_local.hub.large_file import remove_stale
from dots1_local.hub.shard_cache import ShardCache
from dots1_local.hub.shard_order import ShardOrder, order_freely
from dots1_local.hub.shard_supply import ShardSupply, shards_ahead
from dots1_local.progress import Progress
from dots1_local.quant.plan import PlannedTensor

__all__ = ["fetch_shards", "order_of", "refuse_other_commit", "shards_folder"]


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
    remote = on_hub(checkpoint, low_disk)
    if remote is None:
        return None
    refuse_other_commit(remote, output)
    cache = ShardCache(remote)
    need = DiskNeed(output.path, output.total_bytes, output.partials, output.path.name)
    remove_stale(cache.repo)
    if low_disk:
        order = order_of(remote, tensors, cache.held(progress))
        return _plan_low_disk(remote, shards_folder(output), order, need)
    cache.check_room(need, order_of(remote, tensors).peak(0).nbytes, "the output")
    cache.fetch(progress)
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
            file.name for source in tensor.spec.sources for file in checkpoint.locate(source).files
        }.intersection(sizes)
        for tensor in tensors
    }
    return order_freely(needs, sizes)


def shards_folder(output: Output) -> Path:
    """Return the folder beside an output that holds shards while they are needed."""
    return output.target.with_name(f"{output.target.name}.shards")


def _plan_low_disk(
    checkpoint: HubCheckpoint, parent: Path, order: ShardOrder, need: DiskNeed
) -> ShardSupply:
    """Fetch one shard ahead if the disk has room; shards in the hub's cache are read there."""
    ahead, folder = shards_ahead([order], parent, need), parent / checkpoint.repo.commit
    return ShardSupply(checkpoint.with_shards_in(folder, list(order.sizes)), order, folder, ahead)


def refuse_other_commit(checkpoint: Checkpoint, output: Output) -> None:
    """Refuse a branch that moved since a run was interrupted; that run's work would be lost.

    Raises:
        CheckpointError: the revision names another commit than when this output was begun.
    """
    if not isinstance(checkpoint, HubCheckpoint):
        return
    begun, repo = interrupted_source(output), checkpoint.repo
    name, _, commit = begun.partition("@")
    if name == repo.name and commit != repo.commit:
        raise CheckpointError(
            f"{output.target} was begun from {name} at commit {commit[:12]}, and {repo.revision} "
            f"is {repo.commit[:12]} now: resume with --revision {commit}, or remove "
            f"{output.target}.journal to begin again"
        )
