"""Git LFS pointers: the small texts that a clone without git-lfs has in place of large files.

https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

import re
from pathlib import Path

from dots1_local.errors import Dots1Error
from dots1_local.sizes import human_bytes

__all__ = ["POINTER_START", "refuse_pointer"]

POINTER_START = 1024  # bytes; a pointer is shorter, says the specification
_POINTER = re.compile(rb"version https://(?:git-lfs|hawser)\.github\.com/spec/v1\n")
_SIZE = re.compile(rb"^size (\d{1,18})$", re.MULTILINE)


def refuse_pointer(path: Path, start: bytes, error: type[Dots1Error]) -> None:
    """Raise `error` if a file that begins with `start` is a pointer and not the file itself."""
    if not _POINTER.match(start):
        return
    size = _SIZE.search(start)
    of = f" of {human_bytes(int(size[1]))}" if size else ""
    raise error(
        f"{path} is a Git LFS pointer, a text in place of the file{of}; fetch the file with "
        "git lfs pull, or with hf download"
    )
