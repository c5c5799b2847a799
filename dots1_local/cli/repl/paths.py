"""The files that commands name, and the text in them."""

import os
import shlex
from pathlib import Path

from dots1_local.cli._plain import ControlFilter
from dots1_local.errors import UsageError

__all__ = ["conversation_path", "read_text", "state_folder", "typed_path"]

_LARGEST_FILE = 4 << 20  # bytes; a context of 32,768 tokens holds some 150 kB of English


def typed_path(rest: str) -> Path:
    """A path as it is typed: quoted, escaped, or plain with spaces.

    Raises:
        UsageError: there is none, or one that would steer the terminal when it is shown.
    """
    try:
        words = shlex.split(rest)
    except ValueError:
        words = []
    name = words[0] if len(words) == 1 else rest
    if not name:
        raise UsageError("a file name is missing")
    if ControlFilter().feed(name) != name:
        raise UsageError("file names with control characters are not taken")
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UsageError(f"there is no such home folder: {name}") from None


def conversation_path(rest: str) -> Path:
    """The same, with .json where it has no ending.

    Raises:
        UsageError: there is none.
    """
    path = typed_path(rest)
    if path.name in ("", ".."):
        raise UsageError(f"{rest} is no file name")
    return path if path.suffix else path.with_name(f"{path.name}.json")


def state_folder() -> Path:
    """The person's own folder for what outlives a dialogue, in the XDG state folder; it is there.

    Raises:
        OSError: it cannot be made.
        RuntimeError: there is no home folder.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state if os.path.isabs(state) else "~/.local/state").expanduser() / "dots1"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def read_text(path: Path) -> str:
    """The text of a file of bearable size.

    Raises:
        UsageError: no file, unreadable, too long for any context, or not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or a terminal would be waited for
            raise UsageError(f"{path} is not a file")
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > _LARGEST_FILE:
        raise UsageError(f"{path} is longer than {_LARGEST_FILE:,} bytes; no context holds that")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text (at byte {error.start:,})") from None
