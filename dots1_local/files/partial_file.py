"""Output files: checked before work starts, written by one process, and whole or not there at all.

Work in progress is `NAME.partial` beside `NAME`. A process locks the file that it writes; the lock
ends with the process, so a killed run blocks nobody and leaves no lock file behind.
"""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dots1_local.errors import Dots1Error, UsageError
from dots1_local.sizes import bytes_apart

__all__ = [
    "DiskNeed", "check_is_named", "check_parent", "check_space", "check_target", "disk_error",
    "disk_errors", "open_locked", "open_partial", "partial_path", "remove_abandoned",
    "scratch_file", "write_all", "write_whole",
]  # fmt: skip


_POLL = 0.005  # seconds between two looks at a lock that is waited for
_PATIENCE = 10  # seconds; a small file takes milliseconds, unless its writer is frozen


def check_target(path: Path, *, force: bool) -> None:
    """Raise a Dots1Error if a file cannot be written or, without `force`, exists already."""
    try:
        check_parent(path)
        if not path.name or path.is_dir():
            raise Dots1Error(f"{path} is a folder; name a file")
        if not os.path.lexists(path):
            return
        path.stat()  # fails if links form a circle, or if a link leads nowhere, which is fine
        if not path.is_file():
            raise Dots1Error(f"{path} is not a regular file; name another file")
        if not force:
            raise Dots1Error(f"{path} exists; give --force to replace it")
    except FileNotFoundError:
        return
    except OSError as error:
        raise Dots1Error(f"cannot write {path}: {error.strerror or error}") from None


def check_parent(path: Path) -> None:
    """Raise a Dots1Error if the folder of `path` does not exist or is not writable, and a
    UsageError if `path` means stdout."""
    check_is_named(path)
    if not path.parent.is_dir():
        raise Dots1Error(f"no such folder: {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise Dots1Error(f"cannot write {path}: the folder {path.parent} is not writable")


def check_is_named(path: Path) -> None:
    """Raise a UsageError for "-", by which many programs mean stdout."""
    if str(path) == "-":
        raise UsageError(
            "the output cannot be - (stdout), because it is not written in order; "
            "name a file or folder"
        )


def check_space(
    path: Path, nbytes: int, working: Iterable[Path], *, what: str | None = None
) -> None:
    """Refuse `nbytes` that the disk of `path` cannot hold, before the first byte is written.

    The space of `working` files, which a former run left, counts as free. `what` says in the error
    what needs the space; by default it is the file.

    Raises:
        Dots1Error: fewer than `nbytes` are free.
        OSError: the disk does not tell its free space.
    """
    left = sum(file.lstat().st_blocks * 512 for file in working if os.path.lexists(file))
    free = shutil.disk_usage(path.parent).free + left
    if nbytes > free:
        has, needed = bytes_apart(free, nbytes)
        raise Dots1Error(
            f"{path.parent} has {has} free, but {what or path.name} needs {needed}; free some "
            "space or write elsewhere"
        )


@dataclass(frozen=True)
class DiskNeed:
    """The `nbytes` that `what` needs on the disk of `path`.

    The space of `working` files, which a former run left, counts as free.
    """

    path: Path
    nbytes: int
    working: Sequence[Path]
    what: str

    def check(self, more: int = 0, beside: str = "") -> None:
        """Refuse a disk that is too small for this, or for this and `more` bytes for `beside`.

        Raises:
            Dots1Error: too few bytes are free.
            OSError: the disk does not tell its free space.
        """
        what = f"{self.what} with {beside}" if beside else self.what
        check_space(self.path, self.nbytes + more, self.working, what=what)


def disk_error(path: Path, error: OSError, *, kept: bool = True) -> Dots1Error:
    """Say what failed while `path` was written; `kept`: running the command again resumes."""
    if error.errno != errno.ENOSPC:
        return Dots1Error(f"cannot write {path}: {error.strerror or error}")
    if not kept:
        return Dots1Error(f"the disk is full; {path} is not written")
    return Dots1Error(
        f"the disk is full; what is written of {path} is kept: free some space and run the same "
        "command again"
    )


@contextmanager
def disk_errors(path: Path, *, kept: bool = True) -> Iterator[None]:
    """Turn every OSError of the block into the `disk_error` of `path`."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error, kept=kept) from error


def partial_path(path: Path) -> Path:
    """The name that `path` has while it is written."""
    return path.with_name(f"{path.name}.partial")


@contextmanager
def open_locked(
    path: Path, busy: str, *, append: bool = False, private: bool = False, wait: float = 0
) -> Iterator[BinaryIO]:
    """Open `path` for reading and writing, create it if it is missing, and lock it in the block.

    A symbolic link is not followed. Only the owner may read a `private` file. The lock of another
    process is waited for at most `wait` seconds.

    Raises:
        Dots1Error: another process holds the lock; the message is `busy`.
        OSError: the file cannot be opened.
    """
    from filelock import lock_descriptor  # takes 20 ms

    deadline = time.monotonic() + wait
    while True:
        with open(path, "a+b" if append else "r+b", opener=_opener(private)) as file:
            locked = lock_descriptor(file.fileno(), blocking=False)
            # The last owner may have renamed or removed the file after it was opened here.
            if locked and _is_at(file, path):
                yield file
                return
        if time.monotonic() >= deadline:
            raise Dots1Error(busy)
        time.sleep(_POLL)


def _opener(private: bool) -> Callable[[str, int], int]:
    def opener(path: str, flags: int) -> int:
        mode = 0o600 if private else 0o666
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, mode)
        if private:
            os.fchmod(descriptor, mode)
        return descriptor

    return opener


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


@contextmanager
def open_partial(path: Path, *, private: bool = False, wait: float = 0) -> Iterator[BinaryIO]:
    """Write `path` as a whole: the block fills an empty PATH.partial, which then gets the name.

    The file is on the disk before it gets its name. If the block fails, PATH.partial is removed and
    `path` stays as it was. Another process that writes it is waited for at most `wait` seconds.

    Raises:
        Dots1Error: another process is writing PATH.partial.
        OSError: the file cannot be written.
    """
    partial = partial_path(path)
    busy = f"another run is writing {path}"
    with open_locked(partial, busy, private=private, wait=wait) as file:
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of a file; the kernel takes at most 2 GiB at a time."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file as a whole, or raise an OSError; the last of two writers wins.

    Only the owner may read it. What a killed process left of it is overwritten.
    """
    try:
        with open_partial(path, private=True, wait=_PATIENCE) as file:
            file.write(data)
    except Dots1Error as error:
        raise TimeoutError(errno.ETIMEDOUT, str(error)) from None


def remove_abandoned(partials: Iterable[Path]) -> None:
    """Remove those of some partial files that no process is writing."""
    for partial in filter(os.path.lexists, partials):
        with suppress(OSError, Dots1Error), open_locked(partial, "in use"):
            partial.unlink()


@contextmanager
def scratch_file() -> Iterator[Path]:
    """Yield the path of an empty file that no kill leaves behind: it is in memory.

    Where the system has no such files, it is in a temporary folder.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("dots1")
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "scratch"
