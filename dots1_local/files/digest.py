"""What tells whether a file is still the same."""

import hashlib
from pathlib import Path

from dots1_local.errors import Dots1Error

__all__ = ["file_sha256"]


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
