"""Places to write results to: free to take, on a disk that holds them, and written whole."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from dots1_local.errors import Dots1Error

__all__ = ["check_space", "check_target", "disk_error", "write_all", "write_whole"]


def check_target(path: Path, *, force: bool) -> None:
    """Refuse a file that cannot be written, or one that is there already (without `force`).

    Raises:
        Dots1Error: there is no such folder, it may not be written, or something is in the way.
    """
    try:
        if not path.parent.is_dir():
            raise Dots1Error(f"no such folder: {path.parent}")
        if not os.access(path.parent, os.W_OK):
            raise Dots1Error(f"cannot write {path}: its folder may not be written to")
        if not path.name or path.is_dir():
            raise Dots1Error(f"{path} is a folder; name a file")
        if not os.path.lexists(path):
            return
        path.stat()  # a link may lead in circles, and one that leads nowhere is free
        if not path.is_file():
            raise Dots1Error(f"{path} is no regular file; name one")
        if not force:
            raise Dots1Error(f"{path} exists; give --force to replace it")
    except FileNotFoundError:
        return
    except OSError as error:
        raise Dots1Error(f"cannot write {path}: {error.strerror or error}") from None


def check_space(
    path: Path, nbytes: int, working: Iterable[Path], *, what: str | None = None
) -> None:
    """Refuse what the disk of `path` cannot hold, before the first byte.

    What `working` files of a former run take will be used again. `what` needs the space, the file
    itself unless said.

    Raises:
        Dots1Error: fewer than `nbytes` are free.
        OSError: the disk does not say.
    """
    left = sum(file.lstat().st_blocks * 512 for file in working if os.path.lexists(file))
    free = shutil.disk_usage(path.parent).free + left
    if nbytes > free:
        raise Dots1Error(
            f"{path.parent} has {free / 1e9:.1f} GB free, but {what or path.name} needs "
            f"{nbytes / 1e9:.1f} GB; free some or write elsewhere"
        )


def disk_error(path: Path, error: OSError) -> Dots1Error:
    """What to say of work on `path` that can be gone on with."""
    if error.errno == errno.ENOSPC:
        return Dots1Error(
            f"the disk is full; what is written of {path} is kept: free some space and run the "
            "same command again"
        )
    return Dots1Error(f"cannot write {path}: {error.strerror or error}")


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """All of `data` at `offset` of a file; the kernel takes at most 2 GiB at a time."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def write_whole(path: Path, data: bytes) -> None:
    """A small file, on disk as a whole or not at all.

    Raises:
        OSError: it cannot be written there.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
