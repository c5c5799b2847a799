"""Fetch a large file, and go on where a killed run stopped.

huggingface_hub begins again at the first byte when a run was killed, and does not check hashes. In
its cache, the bytes arrive in `blobs/HASH.incomplete`. A complete file gets the name and the link
that huggingface_hub would give it, so that all programs share it.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import BinaryIO

from dots1_local.errors import CheckpointError
from dots1_local.files.partial_file import check_space, disk_errors
from dots1_local.hub.client import HubFile, HubRepo, Received, Stopped, has_digest
from dots1_local.hub.verified import VerifiedFiles

__all__ = ["check_room", "fetch_file", "is_cached", "remove_stale", "snapshot_path"]

_STEP = 1 << 20  # bytes that are hashed at once
_OLD = 60.0  # seconds after which nobody still writes a file of a few bytes


def snapshot_path(repo: HubRepo, name: str) -> Path:
    """Where huggingface_hub's cache has a file of this commit."""
    return _folder(repo) / "snapshots" / repo.commit / name


def is_cached(repo: HubRepo, file: HubFile) -> bool:
    """Whether a file of the listed size is in the cache; it may be damaged."""
    path = snapshot_path(repo, file.name)
    return path.is_file() and path.stat().st_size == file.size


def check_room(repo: HubRepo, files: Iterable[HubFile]) -> None:
    """Refuse files that the cache's disk cannot hold.

    Raises:
        Dots1Error: they need more than is free, or the cache cannot be used.
    """
    folder = _folder(repo) / "blobs"
    missing = [file for file in files if not is_cached(repo, file)]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        needed = sum(file.size for file in missing if not (folder / file.digest).is_file())
        arrived = [_incomplete(folder / file.digest) for file in missing]
        check_space(folder / "x", needed, arrived, what=repo.name)


def remove_stale(repo: HubRepo) -> None:
    """Remove what killed downloads of huggingface_hub left; it would keep them."""
    from filelock import FileLock, Timeout

    folder = _folder(repo)
    for pattern in ("blobs/tmp_*", "refs/*.tmp", "tmp*/dummy_file_*"):
        for path in folder.glob(pattern):
            with suppress(OSError):
                if time.time() - path.lstat().st_mtime > _OLD:
                    path.unlink()
                    if path.name.startswith("dummy_file_"):
                        path.parent.rmdir()
    for path in folder.glob("blobs/*.*.incomplete"):
        lock = folder.parent / ".locks" / folder.name / f"{path.name.partition('.')[0]}.lock"
        with suppress(Timeout, OSError), FileLock(lock, timeout=0):  # nobody is downloading
            path.unlink()


def fetch_file(
    repo: HubRepo,
    file: HubFile,
    folder: Path | None = None,
    *,
    received: Received = lambda count: None,
    stop: Event | None = None,
) -> Path:
    """Fetch a file into the cache, or into `folder`, unless it is there whole; return its path.

    `received` is called with the number of bytes that have arrived.

    Raises:
        CheckpointError: the hub refuses, cannot be reached, or sends another file.
        Dots1Error: the disk is full or cannot be written.
        OSError: the file cannot be read.
        Stopped: `stop` was set.
    """
    stop = stop or Event()
    if not file.in_lfs:
        return repo.fetch(file, folder, received=received, stop=stop)
    if folder is None:
        return _fetch_into_cache(repo, file, received, stop)
    path = folder / file.name
    with disk_errors(path, kept=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (path.is_file() and has_digest(path, file)):
            _download(repo, file, path, received, stop)
    return path


def _fetch_into_cache(repo: HubRepo, file: HubFile, received: Received, stop: Event) -> Path:
    path, verified = snapshot_path(repo, file.name), VerifiedFiles(_folder(repo))
    with disk_errors(path, kept=True):
        if is_cached(repo, file) and verified.is_whole(path, file):
            return path
        blob = _folder(repo) / "blobs" / file.digest
        blob.parent.mkdir(parents=True, exist_ok=True)
        with _lock(repo, file):
            if not (blob.is_file() and verified.is_whole(blob, file)):
                _download(repo, file, blob, received, stop)
                verified.note(blob, file)
            _link(path, blob)
    return path


def _folder(repo: HubRepo) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo.name, repo_type="model")


@contextmanager
def _lock(repo: HubRepo, file: HubFile) -> Iterator[None]:
    """Hold the lock that huggingface_hub takes for this file, too."""
    from filelock import FileLock

    folder = _folder(repo)
    path = folder.parent / ".locks" / folder.name / f"{file.digest}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


def _download(repo: HubRepo, file: HubFile, to: Path, received: Received, stop: Event) -> None:
    path = _incomplete(to)
    for _ in range(2):
        with open(path, "ab+") as opened:
            target = _Target(opened, file.size, received, stop)
            while target.position < file.size:
                repo.receive(file, target.position, target.take)
            os.fsync(opened.fileno())
        if target.digest.hexdigest() == file.digest:
            path.replace(to)
            return
        path.unlink()
    raise CheckpointError(
        f"{file.name} of {repo} arrived twice with another hash than the hub lists "
        f"({file.digest[:12]}...); it is damaged there or on the way"
    )


def _incomplete(path: Path) -> Path:
    return path.with_name(f"{path.name}.incomplete")


class _Target:
    """A file that grows to `size` bytes, and the SHA-256 of what it holds."""

    def __init__(self, file: BinaryIO, size: int, received: Received, stop: Event) -> None:
        self._file, self._size, self._received, self._stop = file, size, received, stop
        self._restart(keep=file.seek(0, os.SEEK_END) <= size)
        for data in iter(partial(file.read, _STEP), b""):
            self._count(data)

    def take(self, position: int, data: bytes) -> None:
        """Append bytes that belong at `position`, which is the end or 0."""
        if position < self.position:
            self._restart(keep=False)
        data = data[: self._size - self.position]
        self._file.write(data)
        self._count(data)

    def _restart(self, *, keep: bool) -> None:
        self.position, self.digest = 0, hashlib.sha256()
        self._file.seek(0)
        if not keep:
            self._file.truncate()

    def _count(self, data: bytes) -> None:
        if self._stop.is_set():
            raise Stopped
        self.position += len(data)
        self.digest.update(data)
        self._received(self.position)


def _link(path: Path, blob: Path) -> None:
    """Let the snapshot have the file, as a relative link where links are possible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:  # as on Windows without the right to make links
        blob.replace(path)
