"""Work with the engine in a process of its own, which a driver or a lost worker may end.

The child, `python -m MODULE REQUEST`, answers with marked lines of JSON on stdout; whatever else
comes there, from drivers, is ignored.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import Empty, Queue
from threading import Thread
from typing import IO, Any

from dots1_local.errors import Dots1Error
from dots1_local.progress import Progress, silent

__all__ = ["answer", "ask", "report_progress"]

_MARK = "dots1-engine "
_LONGEST = 1 << 20  # characters of a line
_PLACE = re.compile(r"^\S*\.(c|cpp|cu|cuh|h|hpp|m):\d+: ")  # of ggml's source


def ask(
    module: str,
    request: Mapping[str, Any],
    doing: str,
    progress: Progress = silent,
    *,
    patience: float = 60.0,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """What `module` answers to a request, given as JSON; `doing` says what for in errors.

    The child is ended after `patience` seconds without a word, and when this is left.

    Raises:
        Dots1Error: the child says so, or it died, hung or made no sense.
    """
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        _started(module, request, log, environment or {}) as (child, lines),
    ):
        for message in _messages(lines, doing, patience):
            if "progress" in message:
                progress(*message["progress"])
            elif "error" in message:
                raise Dots1Error(str(message["error"]))
            else:
                return message.get("answer")
        raise Dots1Error(
            f"the engine died while {doing}: {_last_words(child, log)}; if a driver is to blame, "
            "repair it or hide its devices (CUDA_VISIBLE_DEVICES=-1)"
        )


def report_progress(done: int, total: int, unit: str, what: str) -> None:
    """The child's `Progress`, which becomes the parent's."""
    _say("progress", (done, total, unit, what))


def answer(value: Any) -> None:
    """The child's answer, a `Dots1Error` among them."""
    if isinstance(value, Dots1Error):
        _say("error", str(value))
    else:
        _say("answer", value)


def _say(key: str, value: Any) -> None:
    # A driver may have left a line of its own without an end.
    sys.stdout.write(f"\n{_MARK}{json.dumps({key: value})}\n")
    sys.stdout.flush()


@contextmanager
def _started(
    module: str, request: Mapping[str, Any], log: IO[str], environment: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[str], "Queue[str]"]]:
    """A child, and its lines that are meant for us, with "" at the end."""
    lines: Queue[str] = Queue()
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", module, json.dumps(request)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "GGML_NO_BACKTRACE": "1", **environment},
    )
    reader = Thread(target=_read, args=(child.stdout, lines), daemon=True)
    reader.start()
    with child:
        try:
            yield child, lines
        finally:
            child.kill()
            reader.join(1)  # or it would read from what is being closed


def _messages(lines: "Queue[str]", doing: str, patience: float) -> Iterator[dict[str, Any]]:
    """What the child says until it ends."""
    while True:
        try:
            line = lines.get(timeout=patience)
        except Empty:
            raise Dots1Error(
                f"the engine did not answer for {patience:.0f} seconds while {doing}; check the "
                "device's driver, or the worker"
            ) from None
        if not line:
            return
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise Dots1Error(f"the engine's answer made no sense while {doing}; try again")
        yield message


def _read(stream: IO[str], lines: "Queue[str]") -> None:
    while line := stream.readline(_LONGEST):
        if line.startswith(_MARK):
            lines.put(line.removeprefix(_MARK))
    lines.put("")


def _last_words(child: subprocess.Popen[str], log: IO[str]) -> str:
    """The last line of the log, or how the process ended."""
    code = child.wait()
    log.seek(0)
    lines = [line.strip() for line in log.read()[-_LONGEST:].splitlines() if line.strip()]
    if lines:
        said = _PLACE.sub("", lines[-1])
        return "".join(filter(str.isprintable, said))[:200].rstrip(".")
    return signal.strsignal(-code) or str(code) if code < 0 else f"exit code {code}"
