"""The shards of a checkpoint for passes that read it step by step: embedding, layers, head.

A pass calls its `Provide` before it reads the tensors of a step. For a checkpoint on the disk there
is nothing to do. For one on the hub with little disk, the shards of the step are fetched, one more
is fetched in advance, and the shards that no later step needs are removed. A pass from the last
layer to the first fetches them again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dots1_local.architecture import Dots1Config, TensorSpec, inventory
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.partial_file import DiskNeed
from dots1_local.hub import HubCheckpoint, on_hub
from dots1_local.hub.large_file import remove_stale
from dots1_local.hub.shard_cache import ShardCache
from dots1_local.hub.shard_order import ShardOrder, order_as_given
from dots1_local.hub.shard_supply import ShardSupply, remove_shards, shards_ahead
from dots1_local.progress import Progress, silent
from dots1_local.sizes import human_bytes

__all__ = [
    "EMBEDDING", "HEAD", "PassShards", "Provide", "backward_steps", "forward_steps", "layer_step",
    "on_disk", "open_shards", "step_tensors",
]  # fmt: skip

EMBEDDING, HEAD = "embedding", "head"  # steps; the head comes with the last norm
_USUAL_RATE = 12.5e6  # bytes a second: 100 Mbit/s, before a rate is measured

Provide = Callable[[str, Callable[[str], None]], None]
"""Called before the tensors of a step are read, with a function that hears what is waited for.

Raises:
    Dots1Error: a shard cannot be fetched.
"""


def on_disk(step: str, report: Callable[[str], None]) -> None:
    """The `Provide` of a checkpoint whose shards are on the disk."""


def layer_step(layer: int) -> str:
    """The step of a layer."""
    return f"layer {layer}"


def forward_steps(layers: int, first: int = 0) -> list[str]:
    """The steps of a pass from layer `first` to the head; the embedding comes before layer 0."""
    embedding = [EMBEDDING] if first == 0 else []
    return [*embedding, *map(layer_step, range(first, layers)), HEAD]


def backward_steps(layers: int, reached: int | None = None) -> list[str]:
    """The steps of a pass from the head to the embedding.

    If an earlier run `reached` a layer, from there on.
    """
    head, last = ([HEAD], layers) if reached is None else ([], reached)
    embedding = [EMBEDDING] if last > 0 else []
    return [*head, *map(layer_step, reversed(range(last))), *embedding]


class PassShards:
    """The shards of a checkpoint, of which all are on the disk; `checkpoint` reads them there."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @contextmanager
    def over(self, steps: Sequence[str]) -> Iterator[Provide]:
        """Provide the shards of each step of a pass; steps may be left out, but keep their order.

        The last step's shards stay on the disk, as the next pass may begin there.
        """
        yield on_disk

    def announce(self, passes: Mapping[str, Sequence[str]], notify: Callable[[str], None]) -> None:
        """Say how many bytes the passes fetch, given by name and steps, and how long this takes.

        The time is that at the rate of earlier passes, or at 100 Mbit/s.
        """


class LowDiskShards(PassShards):
    """The shards of a checkpoint on the hub, of which a few lie in a folder at a time."""

    def __init__(self, checkpoint: HubCheckpoint, folder: Path, sizes: dict[str, int]) -> None:
        """`sizes` has the bytes of the shards that have to be fetched."""
        super().__init__(checkpoint.with_shards_in(folder, list(sizes)))
        self._hub, self._folder, self._sizes = checkpoint, folder, sizes
        self.ahead = 1
        self._downloaded, self._seconds = 0, 0.0

    @contextmanager
    def over(self, steps: Sequence[str]) -> Iterator[Provide]:
        moved = self._hub.with_shards_in(self._folder, list(self._sizes))
        with ShardSupply(moved, self.order(steps), self._folder, self.ahead) as supply:
            try:
                yield supply.move_to
            finally:
                self._downloaded += supply.downloaded
                self._seconds += supply.seconds

    def order(self, steps: Sequence[str]) -> ShardOrder:
        """The order of a pass."""
        tensors = step_tensors(self._hub.config)
        needs = {
            step: {file.name for name in tensors[step] for file in self._hub.locate(name).files}
            & set(self._sizes)
            for step in steps
        }
        return order_as_given(needs, self._sizes)

    def announce(self, passes: Mapping[str, Sequence[str]], notify: Callable[[str], None]) -> None:
        nbytes = {name: self.order(steps).nbytes for name, steps in passes.items()}
        amounts = [f"{human_bytes(count)} for {name}" for name, count in nbytes.items() if count]
        rate, named = _USUAL_RATE, "100 Mbit/s"
        if self._seconds:
            rate = self._downloaded / self._seconds
            named = f"the measured {8 * rate / 1e6:,.0f} Mbit/s"
        if amounts:
            duration = _duration(sum(nbytes.values()) / rate)
            notify(f"fetching {', then '.join(amounts)}: about {duration} at {named}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return "a minute"
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"


def step_tensors(config: Dots1Config) -> dict[str, list[str]]:
    """The names of the tensors that each step reads."""
    found: dict[str, list[str]] = {}
    for spec in inventory(config):
        found.setdefault(_step(spec), []).extend(spec.sources)
    return found


def _step(spec: TensorSpec) -> str:
    if spec.layer is not None:
        return layer_step(spec.layer)
    return EMBEDDING if spec.role == "embedding" else HEAD


def open_shards(
    checkpoint: Checkpoint,
    folder: Path,
    passes: Sequence[Sequence[str]],
    need: DiskNeed,
    *,
    low_disk: bool = False,
    progress: Progress = silent,
) -> PassShards:
    """Prepare the shards of a checkpoint for passes over these steps.

    All shards of a checkpoint on the hub are fetched into its cache now; with `low_disk`, those
    that the cache lacks are fetched into `folder`/COMMIT when a step needs them. `need` says what
    else is written on the disk of `folder`. Remove `folder` with `remove_shards` in the end.

    Raises:
        CheckpointError: a shard is refused or arrives damaged, or the hub cannot be reached.
        Dots1Error: a disk is too small.
        UsageError: `low_disk` is given for a folder.
        OSError: the hub's cache cannot be used.
    """
    remote = on_hub(checkpoint, low_disk)
    if remote is None:
        return PassShards(checkpoint)
    cache = ShardCache(remote)
    remove_stale(cache.repo)
    held = set(cache.held(progress)) if low_disk else set()
    sizes = {file.name: file.size for file in cache.files if file.name not in held}
    shards = LowDiskShards(remote, folder / remote.repo.commit, sizes)
    orders = [shards.order(steps) for steps in passes]
    if low_disk:
        shards.ahead = shards_ahead(orders, folder, need)
        return shards
    remove_shards(folder)  # of an earlier run with little disk
    least = max(order.peak(0).nbytes for order in orders)
    cache.check_room(need, least, f"the {need.what}")
    cache.fetch(progress)
    return PassShards(checkpoint)
