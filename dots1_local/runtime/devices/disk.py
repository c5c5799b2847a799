"""How fast a disk is read, with a file that the page cache was made to forget."""

import os
import tempfile
from pathlib import Path
from time import perf_counter

__all__ = ["read_rate"]

_FILE, _PIECE = 1 << 28, 1 << 22  # bytes


def read_rate(folder: Path) -> float | None:
    """Bytes a second that a new file in `folder` is read at; None where that cannot be measured.

    Such are systems other than Linux, file systems in RAM, and full or read-only disks.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return _measured(file.fileno())
    except OSError:
        return None


def _measured(descriptor: int) -> float | None:
    piece = bytearray(os.urandom(_PIECE))  # some file systems compress
    for _ in range(_FILE // _PIECE):
        os.write(descriptor, piece)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    if _is_cached(descriptor):
        return None
    os.lseek(descriptor, 0, os.SEEK_SET)
    start = perf_counter()
    while os.readv(descriptor, [piece]):
        pass
    return _FILE / (perf_counter() - start)


def _is_cached(descriptor: int) -> bool:
    """Whether bytes of the middle are in RAM, or there is no telling."""
    try:
        os.preadv(descriptor, [bytearray(1)], _FILE // 2, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    return True
