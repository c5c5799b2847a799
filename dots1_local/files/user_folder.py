"""Where this program keeps files for itself."""

import os
from pathlib import Path
from typing import Literal

__all__ = ["user_folder"]


def user_folder(kind: Literal["cache", "state"]) -> Path:
    """Return the person's folder for this program, by the XDG rules; it may not exist.

    Raises:
        RuntimeError: there is no home folder.
    """
    base = os.environ.get(f"XDG_{kind.upper()}_HOME", "")
    default = {"cache": "~/.cache", "state": "~/.local/state"}[kind]
    return Path(base if os.path.isabs(base) else default).expanduser() / "dots1"
