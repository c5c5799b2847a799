"""Weights that a worker keeps on disk, so that loading a model again does not send them again.

The engine writes every tensor above 10 MiB to a file named after a hash of its content, and later
believes any file of that name: one that a kill or a full disk cut short would silently become a
model's weights. So a file that was written whole is made read-only here, and no other one stays.
"""

import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from dots1_local.errors import UsageError

__all__ = ["clean", "keep", "open_folder"]

_READ_ONLY = 0o400
_ROOM = 1 << 20  # bytes


def open_folder(folder: Path) -> None:
    """Make the folder, for its owner only, and drop what an earlier worker left half written.

    Raises:
        UsageError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _find_room(folder)
        clean(folder)
    except OSError as error:
        raise UsageError(f"cannot keep weights in {folder}: {error.strerror or error}") from None


def clean(folder: Path) -> None:
    """Drop what may be half written; only while no worker writes there."""
    digits = set("0123456789abcdef")
    for file in folder.iterdir():
        if len(file.name) == 16 and digits.issuperset(file.name) and not _is_kept(file):
            file.unlink(missing_ok=True)


def keep(folder: Path, name: str) -> bool:
    """Keep the file that the engine has just written, unless it may have run out of room."""
    file = folder / name
    try:
        _find_room(folder)
        file.chmod(_READ_ONLY)
    except OSError:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        return False
    return True


def _find_room(folder: Path) -> None:
    """OSError where there is no room for more; the engine overlooks that."""
    with TemporaryFile(dir=folder) as trial:
        os.posix_fallocate(trial.fileno(), 0, _ROOM)


def _is_kept(file: Path) -> bool:
    return file.stat().st_mode & 0o777 == _READ_ONLY
