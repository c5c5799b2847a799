"""Shards in the hub's own cache: which are there and whole, and fetching the others."""

import json
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event, Lock

from dots1_local.errors import CheckpointError
from dots1_local.files.partial_file import write_whole
from dots1_local.hub import HubCheckpoint
from dots1_local.hub.client import HubFile, HubRepo
from dots1_local.hub.download import Received, download, has_digest, incomplete
from dots1_local.hub.small_files import into_cache
from dots1_local.hub.together import together
from dots1_local.progress import Progress, silent

__all__ = ["ShardCache"]

_AT_ONCE = 4  # downloads; a single one rarely fills a line
_VERIFIED = ".dots1-verified.json"


class ShardCache:
    """The shards of one checkpoint in the cache.

    A shard that was hashed is remembered by its size and modification time, so that a resumed run
    does not have to read 286 GB first.
    """

    def __init__(self, checkpoint: HubCheckpoint) -> None:
        self.repo: HubRepo = checkpoint.repo
        self.files = checkpoint.shard_files
        self._snapshot = checkpoint.path
        self._record = checkpoint.path.parent.parent / _VERIFIED
        self._lock = Lock()

    def path(self, file: HubFile) -> Path:
        """Where the shard is read from."""
        return self._snapshot / file.name

    def missing(self) -> list[HubFile]:
        """The shards that are not in the cache; those that are may be damaged."""
        return [file for file in self.files if not self._content(file).is_file()]

    def working_files(self) -> list[Path]:
        """The unfinished downloads that interrupted runs have left."""
        return [incomplete(self._content(file)) for file in self.missing()]

    def holds(self, file: HubFile) -> bool:
        """Whether the shard is there and has the listed hash."""
        return self.path(file).is_file() and self._is_whole(self._content(file), file)

    def fetch(self, progress: Progress = silent) -> None:
        """Fetch what is missing, several at once, and check what was there before.

        Raises:
            CheckpointError: a file is refused or comes damaged, or the hub cannot be reached.
            Dots1Error: the disk fills up.
            OSError: the cache cannot be used.
        """
        left = [file for file in self.files if not self._is_known(file)]
        there = {file.name: 0 if file in left else file.size for file in self.files}
        total = sum(file.size for file in self.files)

        def provide(file: HubFile, stop: Event) -> None:
            self._provide(file, partial(there.__setitem__, file.name), stop)

        def report() -> None:
            progress(sum(there.values()), total, "bytes", f"fetching {self.repo.name}")

        together(provide, left, _AT_ONCE, report)
        if left:  # with this the cache knows the branch too, for runs without a network
            with suppress(CheckpointError):
                into_cache(self.repo, "config.json", self.repo.revision)

    def _provide(self, file: HubFile, received: Received, stop: Event) -> None:
        content, path = self._content(file), self.path(file)
        if content.is_file() and not self._is_whole(content, file):
            content.unlink()
            content = self._content(file)
        if not content.is_file():
            content.unlink(missing_ok=True)  # a link that leads nowhere
            download(self.repo, file, content, received=received, stop=stop)
            self._note(content, file)
        if not path.is_file():
            path.unlink(missing_ok=True)
            with suppress(FileExistsError):
                path.symlink_to(os.path.relpath(content, path.parent))
        received(file.size)

    def _content(self, file: HubFile) -> Path:
        """Where the bytes lie: where links work, the cache keeps files under their hashes."""
        if self.path(file).is_file():
            return Path(os.path.realpath(self.path(file)))
        sibling = self._snapshot / "config.json"
        if not sibling.is_symlink():
            return self.path(file)
        blobs = os.path.normpath(self._snapshot / os.readlink(sibling) / "..")
        return Path(blobs) / file.digest

    def _is_known(self, file: HubFile) -> bool:
        return self.path(file).is_file() and self._was_whole(self._content(file), file)

    def _is_whole(self, content: Path, file: HubFile) -> bool:
        if self._was_whole(content, file):
            return True
        whole = has_digest(content, file)
        if whole:
            self._note(content, file)
        return whole

    def _was_whole(self, content: Path, file: HubFile) -> bool:
        found = content.stat()
        return self._noted().get(file.digest) == [found.st_size, found.st_mtime_ns]

    def _noted(self) -> dict[str, object]:
        try:
            value = json.loads(self._record.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def _note(self, content: Path, file: HubFile) -> None:
        """Remember that it is whole; if that cannot be written, it is hashed again next time."""
        found = content.stat()
        with self._lock, suppress(OSError):
            noted = self._noted() | {file.digest: [found.st_size, found.st_mtime_ns]}
            write_whole(self._record, json.dumps(noted).encode())
