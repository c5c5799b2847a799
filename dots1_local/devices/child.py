"""Work with the engine in a child process, which a driver or a lost worker may kill.

The child, `python -m MODULE REQUEST`, calls `respond`. It answers with lines of JSON on stdout that
begin with a mark; the parent ignores all other lines, which come from drivers.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from queue import Empty, Queue
from threading import Thread
from typing import IO, Any

from dots1_local.errors import Dots1Error
from dots1_local.files.json_file import JsonError, parse_json
from dots1_local.progress import Progress, silent

__all__ = ["ask", "report_error", "report_progress", "respond"]

_MARK = "dots1-engine "
_MAX_LINE = 1 << 20  # characters
_SOURCE = re.compile(r"^\S*\.(c|cpp|cu|cuh|h|hpp|m):\d+: ")  # file and line of ggml's source


def ask(
    module: str,
    request: Mapping[str, Any],
    doing: str,
    progress: Progress = silent,
    *,
    timeout: float = 60.0,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Run `module` in a child process and return its answer to `request`, both as JSON values.

    `doing` tells in errors what the child was doing. The child is killed if it reports nothing for
    `timeout` seconds, and in any case at the end.

    Raises:
        Dots1Error: the child reports an error, dies, hangs or answers nonsense.
    """
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        _started(module, request, log, environment or {}) as (child, lines),
    ):
        for message in _messages(lines, doing, timeout):
            if "progress" in message:
                progress(*message["progress"])
            elif "error" in message:
                raise Dots1Error(str(message["error"]))
            else:
                return message.get("answer")
        raise Dots1Error(
            f"the engine died while {doing}: {_cause(child, log)}; if a driver is to blame, "
            "repair it or hide its devices (CUDA_VISIBLE_DEVICES=-1)"
        )


def respond(work: Callable[[Any], Any]) -> None:
    """The child's part: call `work` with the request, and send its result or its Dots1Error."""
    try:
        _send("answer", work(json.loads(sys.argv[1])))
    except Dots1Error as error:
        report_error(str(error))


def report_error(sentence: str) -> None:
    """In the child: make the parent raise a Dots1Error."""
    _send("error", sentence)


def report_progress(done: int, total: int, unit: str, what: str) -> None:
    """In the child: report to the parent's `Progress`."""
    _send("progress", (done, total, unit, what))


def _send(key: str, value: Any) -> None:
    # It begins with a newline, because a driver may have left a line without an end.
    sys.stdout.write(f"\n{_MARK}{json.dumps({key: value})}\n")
    sys.stdout.flush()


@contextmanager
def _started(
    module: str, request: Mapping[str, Any], log: IO[str], environment: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[str], "Queue[str]"]]:
    """Start a child; yield it and its marked lines, the last of which is ""."""
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
            reader.join(1)  # it must not read from the pipe while that is being closed


def _messages(lines: "Queue[str]", doing: str, timeout: float) -> Iterator[dict[str, Any]]:
    """The child's messages until it ends."""
    while True:
        try:
            line = lines.get(timeout=timeout)
        except Empty:
            raise Dots1Error(
                f"the engine did not answer for {timeout:.0f} seconds while {doing}; check the "
                "device's driver, or the worker"
            ) from None
        if not line:
            return
        try:
            message = parse_json(line.encode())
        except JsonError:
            message = None
        if not isinstance(message, dict):
            raise Dots1Error(f"the engine's answer made no sense while {doing}; try again")
        yield message


def _read(stream: IO[str], lines: "Queue[str]") -> None:
    while line := stream.readline(_MAX_LINE):
        if line.startswith(_MARK):
            lines.put(line.removeprefix(_MARK))
    lines.put("")


def _cause(child: subprocess.Popen[str], log: IO[str]) -> str:
    """The last line of the log, or how the process ended."""
    code = child.wait()
    log.seek(0)
    lines = [line.strip() for line in log.read()[-_MAX_LINE:].splitlines() if line.strip()]
    if lines:
        last = _SOURCE.sub("", lines[-1])
        return "".join(filter(str.isprintable, last))[:200].rstrip(".")
    return signal.strsignal(-code) or str(code) if code < 0 else f"exit code {code}"
