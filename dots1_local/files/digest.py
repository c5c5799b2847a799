"""What tells whether a file is still the same."""

import hashlib
import struct
from pathlib import Path
from typing import Any, BinaryIO

from dots1_local.errors import Dots1Error
from dots1_local.files.gguf import GGUFFile

__all__ = ["BLOCK", "file_sha256", "hash_model", "hash_range"]

BLOCK = 1 << 16  # bytes
_BLOCKS = 64  # of each file: 4 MB, half a second of a disk that seeks


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        Dots1Error: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Dots1Error(f"cannot read {path}: {error.strerror}") from None


def hash_model(digest: Any, gguf: GGUFFile) -> None:
    """Hash the header and the length of every shard, and blocks of its weights."""
    for path in gguf.files:
        size = path.stat().st_size
        offsets = (tensor.offset for tensor in gguf.tensors if tensor.file == path)
        with path.open("rb") as file:
            hash_range(digest, file, min(offsets, default=size), size)


def hash_range(digest: Any, file: BinaryIO, middle: int, end: int) -> None:
    """Hash a file whole up to `middle`, then blocks up to its very `end`, and both positions."""
    digest.update(struct.pack("<2Q", middle, end))
    file.seek(0)
    digest.update(file.read(middle))
    last = max(middle, end - BLOCK)
    for number in range(_BLOCKS):
        file.seek(middle + (last - middle) * number // (_BLOCKS - 1))
        digest.update(file.read(min(BLOCK, end - middle)))
