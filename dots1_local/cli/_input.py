"""Text from arguments and pipes: in the locale's encoding, as the terminal is; files are UTF-8.

Text that is not in its encoding is refused. Names of files may be any bytes: they are used as they
are, printed with escapes, and stored with replacements.
"""

import sys
from io import UnsupportedOperation
from select import select

from dots1_local.cli._output import notice
from dots1_local.errors import UsageError

__all__ = ["LARGEST_TEXT", "check_text", "piped_text"]

LARGEST_TEXT = 4 << 20  # bytes; a context of 32,768 tokens holds some 150 kB of English
_PATIENCE = 2.0  # seconds until a person is told what is waited for


def piped_text() -> str | None:
    """Return what is piped in without the newline at its end; None if stdin is a terminal.

    Raises:
        UsageError: the text is too long, or is not in the locale's encoding.
    """
    if sys.stdin.isatty():
        return None
    if not _is_ready():
        notice("reading what is piped in until it ends; to pipe in nothing, add < /dev/null")
    content = sys.stdin.buffer.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise UsageError(
            f"what is piped in is longer than {LARGEST_TEXT:,} bytes; no context holds that"
        )
    encoding = sys.stdin.encoding
    try:
        return content.decode(encoding).removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"what is piped in is not {encoding.upper()} text (at byte {error.start:,})"
        ) from None


def check_text(source: str, text: str) -> None:
    """Raise a UsageError if a text from `source` has bytes that are not in the locale's encoding.

    Python keeps these bytes in names and arguments as characters that no model can read.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding().upper()
        raise UsageError(
            f"{source} is not {encoding} text (at character {error.start:,})"
        ) from None


def _is_ready() -> bool:
    """Whether stdin has text or has ended, perhaps after a moment."""
    try:
        return bool(select([sys.stdin], [], [], _PATIENCE)[0])
    except (OSError, ValueError, UnsupportedOperation):  # what is no file, and on Windows no socket
        return True
