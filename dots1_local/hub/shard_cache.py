"""Shards in the hub's own cache: which are there and undamaged, and fetching the others."""

from functools import partial
from pathlib import Path
from threading import Event

from dots1_local.errors import Dots1Error
from dots1_local.files.partial_file import DiskNeed, check_space
from dots1_local.hub import HubCheckpoint
from dots1_local.hub.client import HubFile, parallel_map
from dots1_local.hub.large_file import fetch_file
from dots1_local.hub.verified import VerifiedFiles
from dots1_local.progress import Progress, silent
from dots1_local.sizes import human_bytes

__all__ = ["ShardCache"]

_AT_ONCE = 4  # downloads; one alone rarely uses the whole bandwidth


class ShardCache:
    """The shards of one checkpoint in the cache."""

    def __init__(self, checkpoint: HubCheckpoint) -> None:
        self.repo, self._checkpoint = checkpoint.repo, checkpoint
        self.files = checkpoint.shard_files
        self._snapshot = checkpoint.path
        self._folder = checkpoint.path.parent.parent
        self._verified = VerifiedFiles(self._folder)

    def path(self, file: HubFile) -> Path:
        """Where the shard is read from."""
        return self._snapshot / file.name

    def missing(self) -> list[HubFile]:
        """Return the shards that are not in the cache; the others may be damaged."""
        blobs = self._folder / "blobs"  # another commit may share the file
        return [
            file
            for file in self.files
            if not self.path(file).is_file() and not (blobs / file.digest).is_file()
        ]

    def holds(self, file: HubFile) -> bool:
        """Whether the shard is there and has the listed hash."""
        path = self.path(file)
        return path.is_file() and self._verified.is_whole(path, file)

    def held(self, progress: Progress = silent) -> list[str]:
        """Return the names of the shards that are there and undamaged."""
        names = []
        for index, file in enumerate(self.files):
            if self.holds(file):
                self._checkpoint.check_header(self.path(file))
                names.append(file.name)
                progress(index + 1, len(self.files), "shards", "checking the hub's cache")
        return names

    def check_room(self, need: DiskNeed, least: int, beside: str) -> None:
        """Refuse disks that cannot hold what is needed, and the missing shards.

        The advice is to give --low-disk, which needs `least` bytes `beside` what is written.

        Raises:
            Dots1Error: a disk is too small.
        """
        if not (missing := self.missing()):
            return
        need.check()
        place, nbytes = self.path(missing[0]), sum(file.size for file in missing)
        try:
            if place.parent.stat().st_dev == need.path.parent.stat().st_dev:
                need.check(nbytes, "the checkpoint")
            else:
                check_space(place, nbytes, (), what="the checkpoint")
        except Dots1Error as error:
            advice = f"give --low-disk, which needs {human_bytes(least)} beside {beside}"
            raise Dots1Error(f"{error}, or {advice}") from None

    def fetch(self, progress: Progress = silent) -> None:
        """Fetch missing shards, several at once, and check the hashes and headers of all.

        Raises:
            CheckpointError: a file is refused or arrives damaged, or the hub cannot be reached.
            Dots1Error: the disk fills up.
            OSError: the cache cannot be used.
        """
        arrived = dict.fromkeys(self.files, 0)
        total = sum(file.size for file in self.files)

        def provide(file: HubFile, stop: Event) -> None:
            received = partial(arrived.__setitem__, file)
            fetch_file(self.repo, file, received=received, stop=stop)
            received(file.size)

        def report() -> None:
            progress(sum(arrived.values()), total, "bytes", f"fetching {self.repo.name}")

        parallel_map(provide, self.files, _AT_ONCE, report)
        self.repo.note_revision("config.json")
        for file in self.files:
            self._checkpoint.check_header(self.path(file))
