"""Shards of a hub checkpoint beside the output: fetched before they are needed, removed after.

They lie in NAME.shards/COMMIT, and there are never more of them than the order's peak.
"""

import re
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self

from dots1_local.convert.shard_order import ShardOrder, order_tensors
from dots1_local.convert.writer import Output, Slot
from dots1_local.files.partial_file import disk_error
from dots1_local.hub import HubCheckpoint
from dots1_local.hub.client import HubFile
from dots1_local.hub.download import Stopped, download, incomplete
from dots1_local.quant.plan import PlannedTensor

__all__ = ["ShardSupply", "clear", "order_of", "working_folder"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PATIENCE = 1.0  # seconds for the fetching thread to notice that it is stopped


def order_of(
    checkpoint: HubCheckpoint, tensors: Iterable[PlannedTensor], held: Iterable[str] = ()
) -> ShardOrder:
    """How to convert tensors with few shards on disk, not counting those `held` in the cache."""
    sizes = {file.name: file.size for file in checkpoint.shard_files if file.name not in set(held)}
    needs = {
        tensor.spec.name: {
            checkpoint.locate(source).file.name for source in tensor.spec.sources
        }.intersection(sizes)
        for tensor in tensors
    }
    return order_tensors(needs, sizes)


def working_folder(output: Output, checkpoint: HubCheckpoint) -> Path:
    """Where the shards of one commit lie while they are needed."""
    return _folder(output) / checkpoint.repo.commit


def clear(output: Output) -> None:
    """Remove every shard that conversions to this output have left."""
    _clear(_folder(output))
    with suppress(OSError):
        _folder(output).rmdir()


class ShardSupply:
    """Brings the shards that each step needs; use it in a `with` statement.

    `ahead` shards are fetched in advance. Leaving the block stops fetching; what is fetched stays.
    """

    def __init__(
        self, checkpoint: HubCheckpoint, order: ShardOrder, folder: Path, ahead: int
    ) -> None:
        self._checkpoint, self._order = checkpoint, order
        self._folder, self._ahead = folder, ahead
        self._step_of = {name: at for at, step in enumerate(order.steps) for name in step.tensors}
        self._changed = threading.Condition()
        self._allowed = 0  # how many of the order's fetches
        self._there: set[str] = set()
        self._received = dict.fromkeys(order.fetches, 0)  # bytes
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._what = ""
        self._thread = threading.Thread(target=self._work, name="fetch", daemon=True)

    def __enter__(self) -> Self:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _clear(self._folder.parent, besides=self._folder)
            _keep(self._folder, next(self._order.on_disk(self._ahead), ()))
        except OSError as error:
            raise disk_error(self._folder, error) from error
        self._allow(0)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(_PATIENCE)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards that are to be fetched."""
        return sum(self._order.sizes[shard] for shard in self._order.fetches)

    @property
    def received(self) -> int:
        """Bytes that have been fetched so far."""
        return sum(self._received.values())

    def arranged(self, slots: Sequence[Slot]) -> list[Slot]:
        """The slots in the order in which to convert their tensors."""
        return sorted(slots, key=lambda slot: self._step_of[slot.tensor.spec.name])

    def wait(self, slot: Slot, waiting: Callable[[str], None]) -> None:
        """Return when the slot's shards are there; until then tell `waiting` what is fetched.

        Raises:
            Dots1Error: one of them cannot be fetched.
        """
        needed = self._order.steps[self._step_of[slot.tensor.spec.name]].shards
        with self._changed:
            while not needed <= self._there:
                if self._error is not None:
                    raise self._error
                waiting(self._what)
                self._changed.wait(0.2)

    def finished(self, slot: Slot, close: Callable[[Path], None]) -> None:
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
        path = self._folder / file.name
        if not path.is_file():
            download(self._checkpoint.repo, file, path, received=received, stop=self._stop)
        self._checkpoint.check_start(path)
        received(file.size)
        with self._changed:
            self._there.add(file.name)
            self._changed.notify_all()


def _folder(output: Output) -> Path:
    return output.target.with_name(output.target.name + ".shards")


def _clear(parent: Path, besides: Path | None = None) -> None:
    """Remove the shards of all commits, or of all but one."""
    for folder in parent.glob("*"):
        if _COMMIT.fullmatch(folder.name) and folder != besides:
            _keep(folder, ())
            with suppress(OSError):
                folder.rmdir()


def _keep(folder: Path, shards: Iterable[str]) -> None:
    """Remove other shards than these, whole or not; files of another kind are not ours."""
    kept = {name for shard in shards for name in (shard, incomplete(folder / shard).name)}
    for path in folder.glob("*.safetensors*"):
        if path.name not in kept:
            path.unlink()
