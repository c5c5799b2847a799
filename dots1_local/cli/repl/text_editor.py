"""The person's own editor on a piece of text."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from dots1_local.errors import UsageError

__all__ = ["edit_text", "editor_command"]


def editor_command() -> list[str]:
    """$VISUAL or $EDITOR, as words; none if neither is set.

    Raises:
        UsageError: it has an unclosed quote.
    """
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""
    try:
        return shlex.split(command)
    except ValueError as error:
        raise UsageError(f"the editor {command!r} is no command: {error}") from None


def edit_text(command: list[str], text: str) -> str:
    """What a person makes of `text`, without the newline that editors end a file with.

    Raises:
        UsageError: the editor cannot be run, fails, or leaves what is no UTF-8.
    """
    with TemporaryDirectory(prefix="dots1-") as folder:
        path = Path(folder) / "message.md"
        path.write_text(text, encoding="utf-8")
        try:
            # stdout may be a pipe for answers; an editor wants the terminal.
            status = subprocess.run([*command, str(path)], stdout=sys.stderr, check=False)
            edited = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot edit with {command[0]}: {error}") from None
    if status.returncode:
        raise UsageError(f"{command[0]} ended with status {status.returncode}; nothing is changed")
    return edited.removesuffix("\n")
