"""Shards of a hub checkpoint on a small disk: fetched before they are needed, removed after.

They lie in a folder that is named after the commit.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from threading import Event
from typing import Self

from dots1_local.errors import Dots1Error
from dots1_local.files.partial_file import DiskNeed, disk_errors
from dots1_local.hub import HubCheckpoint
from dots1_local.hub.client import HubFile, Stopped
from dots1_local.hub.large_file import fetch_file
from dots1_local.hub.shard_order import ShardOrder

__all__ = ["ShardSupply", "remove_shards", "shards_ahead"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_GRACE = 1.0  # seconds for a download to notice that it is stopped
_HUB_FILES = ".cache"  # what huggingface_hub keeps in a folder that it fetches to


class ShardSupply:
    """Brings the shards that each step of an order needs into `folder`, in a `with` statement.

    `ahead` shards are fetched in advance. Leaving the block stops fetching; fetched shards stay.
    `checkpoint` reads these shards from `folder`.
    """

    def __init__(
        self, checkpoint: HubCheckpoint, order: ShardOrder, folder: Path, ahead: int
    ) -> None:
        self.checkpoint, self._order = checkpoint, order
        self._folder, self._ahead = folder, ahead
        self._step_of = {name: at for at, step in enumerate(order.steps) for name in step.names}
        self._pool: ThreadPool
        self._stop = Event()
        self._arrivals: dict[str, AsyncResult[None]] = {}
        self._received = dict.fromkeys(order.fetches, 0)  # bytes
        self._reached = 0  # the step whose shards are on disk
        self._what = ""
        self.downloaded, self.seconds = 0, 0.0  # without shards that were there

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
        """Return a supply for all names of the order except `done`."""
        order = self._order.without(done)
        return ShardSupply(self.checkpoint, order, self._folder, self._ahead)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards that are to be fetched."""
        return self._order.nbytes

    @property
    def received(self) -> int:
        """Bytes that have been fetched so far."""
        return sum(self._received.values())

    def step(self, name: str) -> int:
        """The number of the step that a name belongs to; steps are handled in ascending order."""
        return self._step_of[name]

    def wait(self, name: str, report: Callable[[str], None]) -> None:
        """Wait for what a name reads; meanwhile `report` is called with the shard that is fetched.

        Raises:
            Dots1Error: a shard cannot be fetched.
        """
        for shard in self._order.steps[self.step(name)].shards:
            while not self._arrivals[shard].ready():
                report(self._what)
                self._arrivals[shard].wait(0.2)
            self._arrivals[shard].get()

    def finish(self, name: str, close: Callable[[Path], None] = lambda path: None) -> None:
        """Close and remove the shards that nothing after this name needs."""
        at = self.step(name)
        if name != self._order.steps[at].names[-1]:
            return
        for shard in self._order.dropped_after(at):
            close(self._folder / shard)
            (self._folder / shard).unlink(missing_ok=True)
        if at + 1 < len(self._order.steps):
            self._request(at + 1)

    def move_to(self, name: str, report: Callable[[str], None]) -> None:
        """Finish all steps before that of `name`, and wait for what `name` reads.

        Raises:
            Dots1Error: a shard cannot be fetched.
        """
        while self._reached < self.step(name):
            self.finish(self._order.steps[self._reached].names[-1])
            self._reached += 1
        self.wait(name, report)

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
        arrived, begun = 0, time.monotonic()

        def received(count: int) -> None:
            nonlocal arrived
            self._received[file.name] = arrived = count

        repo = self.checkpoint.repo
        path = fetch_file(repo, file, self._folder, received=received, stop=self._stop)
        if arrived:
            self.downloaded += file.size
            self.seconds += time.monotonic() - begun
        self.checkpoint.check_header(path)
        self._received[file.name] = file.size


def shards_ahead(orders: Sequence[ShardOrder], folder: Path, need: DiskNeed) -> int:
    """How many shards to fetch in advance into `folder`: 1 if the disk has room, or else 0.

    `need` says what else is written on that disk. What lies in `folder` counts as free.

    Raises:
        Dots1Error: the disk has no room for the shards of one step.
    """
    shards = (each for each in folder.rglob("*") if each.is_file())
    need = replace(need, working=[*need.working, *shards])

    def check(ahead: int) -> None:
        peak = max((order.peak(ahead) for order in orders), key=lambda peak: peak.nbytes)
        need.check(peak.nbytes, f"{peak.shards} shards")

    try:
        check(1)
    except Dots1Error:
        check(0)
        return 0
    return 1


def remove_shards(parent: Path, besides: Path | None = None) -> None:
    """Remove the shards of all commits in a folder of shards, or of all but one."""
    for folder in parent.glob("*"):
        if _COMMIT.fullmatch(folder.name) and folder != besides:
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        parent.rmdir()


def _remove_others(folder: Path, shards: Iterable[str]) -> None:
    """Remove all shards but these, and unfinished downloads; other files are not ours."""
    for path in folder.glob("*.safetensors*"):
        if path.name.removesuffix(".incomplete") not in shards:
            path.unlink()
    for path in (folder / _HUB_FILES).rglob("*.incomplete"):
        path.unlink()
