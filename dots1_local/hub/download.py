"""One file from the hub to disk: resumed where it was cut off, and checked by its hash.

huggingface_hub's own download begins a file anew after a kill or a reset connection, and looks at
sizes only. This one asks for the bytes that are missing, through that library's HTTP session.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import BinaryIO

from dots1_local.errors import CheckpointError, Dots1Error
from dots1_local.files.partial_file import disk_error
from dots1_local.hub.client import HubFile, HubRepo
from dots1_local.hub.complaints import is_passing, pause_asked_for

__all__ = ["Stopped", "download", "has_digest", "incomplete"]

_TRIES = 6  # in a row that bring nothing
_PAUSE = 0.5  # seconds before the second of them, twice as many before each further one
_LONGEST_PAUSE = 60.0
_CHUNK = 1 << 20

Received = Callable[[int], None]


class Stopped(Exception):
    """The download was called off; what is fetched stays."""


def incomplete(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(path.name + ".incomplete")


def download(
    repo: HubRepo, file: HubFile, path: Path, *, received: Received, stop: Event | None = None
) -> None:
    """Fetch a file; it is renamed to `path` only when it is whole and has the listed hash.

    `received` is called with how many of its bytes are there. A file with another hash is fetched
    once more.

    Raises:
        CheckpointError: the hub refuses it, cannot be reached, or sends another file.
        Dots1Error: the disk fills up, or someone else is fetching it.
        Stopped: `stop` was set.
    """
    part = incomplete(path)
    try:
        with repo.asking(file.name), open(part, "a+b") as out:
            _lock(out, part)
            for _ in range(2):
                if _fetch(repo, file, out, received, stop or Event()) == file.digest:
                    out.flush()
                    os.fsync(out.fileno())
                    os.replace(part, path)
                    return
                out.truncate(0)
            part.unlink()
    except OSError as error:
        raise disk_error(part, error) from error
    raise CheckpointError(
        f"{file.name} of {repo} came twice with another hash than the hub lists "
        f"({file.digest[:12]}...); it is damaged there or on the way"
    )


def has_digest(path: Path, file: HubFile) -> bool:
    """Whether a file on disk is the one the hub lists."""
    with open(path, "rb") as found:
        same_size = os.fstat(found.fileno()).st_size == file.size
        return same_size and _Hashed(file, found).digest == file.digest


def _fetch(repo: HubRepo, file: HubFile, out: BinaryIO, received: Received, stop: Event) -> str:
    """Make the file whole; returns its digest."""
    if out.seek(0, os.SEEK_END) > file.size:
        out.truncate(0)
    out.seek(0)
    hashed = _Hashed(file, out)
    received(hashed.size)
    failures, furthest = 0, hashed.size
    while hashed.size < file.size:
        problem = _receive(repo, file, hashed, received, stop)
        failures = 0 if hashed.size > furthest else failures + 1
        furthest = max(furthest, hashed.size)
        if problem is None or not failures:
            continue
        if failures == _TRIES:
            raise problem
        pause = pause_asked_for(problem) or _PAUSE * 2 ** (failures - 1)
        if stop.wait(min(pause, _LONGEST_PAUSE)):
            raise Stopped
    return hashed.digest


def _receive(
    repo: HubRepo, file: HubFile, hashed: "_Hashed", received: Received, stop: Event
) -> Exception | None:
    """Write what one request brings; returns the passing failure that ended it early, if any."""
    try:
        with repo.open(file, hashed.size, file.size) as response:
            if response.status_code == 200:
                hashed.begin_again()
            for chunk in response.iter_raw():
                if stop.is_set():
                    raise Stopped
                hashed.write(chunk)
                received(hashed.size)
    except Exception as error:
        if not is_passing(error):
            raise
        return error
    if hashed.size < file.size:
        return CheckpointError(f"{repo} ends {file.name} after {hashed.size} of {file.size} bytes")
    return None


class _Hashed:
    """A file that is hashed as it grows, beginning with what it already holds."""

    def __init__(self, file: HubFile, out: BinaryIO) -> None:
        self._file, self._out = file, out
        self._hash = _hasher(file)
        while data := out.read(_CHUNK):
            self._hash.update(data)
        self.size = out.tell()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        if self.size + len(data) > self._file.size:
            raise CheckpointError(f"{self._file.name} is longer than the hub lists it to be")
        self._out.write(data)
        self._hash.update(data)
        self.size += len(data)

    def begin_again(self) -> None:
        """For a server that sends the whole file, whatever part was asked for."""
        self._out.truncate(0)
        self._hash, self.size = _hasher(self._file), 0


def _hasher(file: HubFile) -> "hashlib._Hash":
    if len(file.digest) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)  # as git names contents


def _lock(out: BinaryIO, part: Path) -> None:
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Dots1Error(f"another process is fetching {part}; wait for it") from None
