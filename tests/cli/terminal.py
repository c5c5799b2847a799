"""A pseudo-terminal for tests: types keys into a program and shows its screen."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Self

import pyte

CTRL_C, CTRL_D, TAB, UP = "\x03", "\x04", "\t", "\x1b[A"
PASTE_BEGIN, PASTE_END = "\x1b[200~", "\x1b[201~"
PROMPT = "> "

_DEADLINE = 30  # seconds; only a failing test waits so long
_ROWS, _COLUMNS = 200, 160  # tall, so that nothing scrolls away
# The terminal becomes the child's own, so that Ctrl-C typed there is a signal.
_CHILD = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
exec(sys.argv.pop(1))
from dots1_local.cli import main
main()
"""

# Python that makes the sixth call of the engine abort as a lost worker does.
ABORTS = """
from dots1_local.engine.engine import Engine
decode = Engine.decode
calls = []
def aborting(*arguments, **options):
    calls.append(None)
    if len(calls) == 6:
        from dots1_local.ggml import library
        library().ggml_abort(b"ggml-rpc.cpp", 1, b"Remote RPC server crashed or returned nothing")
    return decode(*arguments, **options)
Engine.decode = aborting
"""


class Terminal:
    """`dots1` in a pseudo-terminal, with `folder` as its home; use it in a `with` statement.

    `first` is Python that the process runs before anything else.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        stdout: IO[bytes] | None = None,
        first: str = "",
        **environment: str,
    ) -> None:
        self.seen = b""
        self.screen = pyte.Screen(_COLUMNS, _ROWS)
        self._stream = pyte.ByteStream(self.screen)
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, first, *map(str, arguments)],
            stdin=theirs,
            stdout=stdout or theirs,
            stderr=theirs,
            cwd=folder,
            env=_environment(folder, environment),
            start_new_session=True,
        )
        os.close(theirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    @property
    def lines(self) -> list[str]:
        """The lines of the screen down to the cursor, without trailing blanks."""
        return [line.rstrip() for line in self.screen.display[: self.screen.cursor.y + 1]]

    @property
    def text(self) -> str:
        """The lines as one string."""
        return "\n".join(self.lines)

    def wait_for(self, text: str) -> None:
        """Wait until the text is on the screen."""
        self._wait(lambda: text in self.text, repr(text))

    def wait_for_prompt(self, below: int = -1) -> None:
        """Wait until the cursor is at an empty prompt under line `below`."""
        self._wait(
            lambda: self.screen.cursor.y > below and self.lines[-1] == PROMPT.strip(), "a prompt"
        )

    def send(self, keys: str) -> None:
        """Type keys, and wait for nothing."""
        os.write(self._ours, keys.encode())

    def type(self, text: str) -> None:
        """Type text, and wait until its last line is on the screen."""
        self.send(text)
        last = text.splitlines()[-1].rstrip()
        self._wait(lambda: self.lines[-1].endswith(last), repr(last))

    def enter(self, line: str) -> str:
        """Type a line and Enter; return what appears until the next prompt."""
        self.type(line)
        return self.finish()

    def finish(self) -> str:
        """Press Enter; return what appears until the next prompt."""
        top = self.screen.cursor.y
        self.send("\r")
        self.wait_for_prompt(below=top)
        return "\n".join(self.lines[top + 1 : -1])

    def wait_for_end(self) -> int:
        """Wait for the end of the process, read its last output, and return its exit code."""
        self._wait(lambda: self.process.poll() is not None, "the end")
        while self._read(0):
            pass
        return self.process.wait()

    def _wait(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _DEADLINE
        while not happened():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} did not come; the screen shows\n{self.text}")
            self._read(0.05)

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._ours], [], [], seconds)
        if not ready:
            return False
        try:
            output = os.read(self._ours, 1 << 16)
        except OSError:  # Linux raises it when the other end is closed
            return False
        self.seen += output
        self._stream.feed(
            output.replace(CTRL_C.encode(), b"")
        )  # pyte drops what follows an echoed Ctrl-C
        return bool(output)


def _environment(home: Path, changes: Mapping[str, str]) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {
        "HOME": str(home),
        "TERM": "xterm-256color",
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PROMPT_TOOLKIT_NO_CPR": "1",  # nothing here reports the position of the cursor
        **changes,
    }
