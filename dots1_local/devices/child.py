"""Work with the engine in a child process, which a driver or a lost worker may kill.

The child, `python -m MODULE REQUEST`, calls `respond`. It answers with lines of JSON on stdout that
begin with a mark; the parent ignores all other lines, which come from drivers. While the child
computes without a result, as when a driver compiles shaders, it says so every few seconds.
"""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import Empty, Queue
from threading import Lock, Thread
from typing import IO, Any

from dots1_local.devices.drivers import hiding_variables
from dots1_local.errors import Dots1Error, readable
from dots1_local.files.json_file import JsonError, parse_json
from dots1_local.progress import Progress, silent

__all__ = ["ask", "report_error", "report_progress", "respond"]

_MARK = "dots1-engine "
_MAX_LINE = 1 << 20  # characters
_PATIENCE = 900.0  # seconds without a result, however busy the child is
_PULSE = 2.0  # seconds
_LONG = 10.0  # seconds of a step after which its duration is shown
_SOURCE = re.compile(r"^\S*\.(c|cpp|cu|cuh|h|hpp|m):\d+: ")  # file and line of ggml's source
# Lines that may say why a process was killed; others, such as lists of devices, do not.
_COMPLAINT = re.compile(r"what\(\)|\b(error|fail|failed|lost|abort|fault|fatal)\b", re.IGNORECASE)
# What to do about signals that tell their cause.
_ADVICE: dict[int, str] = {
    signal.SIGILL: "llama.cpp was compiled for another processor, or by gcc 12 for one with AMX; "
    "compile it again, as docs/run.md says under Illegal instruction",
    signal.SIGKILL: "Linux kills what takes more memory than is free or than a limit allows, so "
    "free some or raise the limit",
}
_log = logging.getLogger("dots1_local.engine")
_sending = Lock()


def ask(
    module: str,
    request: Mapping[str, Any],
    doing: str,
    progress: Progress = silent,
    *,
    devices: Sequence[str] = (),
    timeout: float = 60.0,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Run `module` in a child process and return its answer to `request`, both as JSON values.

    `doing` tells in errors what the child was doing, and `devices` with which devices. The child is
    killed if it neither reports anything nor computes for `timeout` seconds, if it reports nothing
    for 15 minutes, and in any case at the end. Its own log goes to the logger `dots1_local.engine`.

    Raises:
        Dots1Error: the child reports an error, dies, hangs or answers nonsense.
    """
    advice = _advice(devices)
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        _started(module, request, log, environment or {}) as (child, lines),
    ):
        try:
            for message in _messages(lines, doing, timeout, progress, advice):
                if "error" in message:
                    raise Dots1Error(str(message["error"]))
                return message.get("answer")
            code = child.wait()
            advice = _ADVICE.get(-code, advice)
            raise Dots1Error(f"the engine died while {doing}: {_cause(code, log)}; {advice}")
        finally:
            if _log.isEnabledFor(logging.DEBUG):
                for line in _lines(log):
                    _log.debug(line)


def respond(work: Callable[[Any], Any]) -> None:
    """The child's part: call `work` with the request, and send its result or its Dots1Error."""
    logging.basicConfig(level=logging.DEBUG, format="%(message)s")  # to stderr, for the parent
    Thread(target=_report_computing, daemon=True).start()
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


def _report_computing() -> None:
    """In the child: tell the parent every few seconds that any thread has computed."""
    before = time.process_time()
    while True:
        time.sleep(_PULSE)
        now = time.process_time()
        if now - before > _PULSE / 10:
            _send("computing", now)
        before = now


def _send(key: str, value: Any) -> None:
    # It begins with a newline, because a driver may have left a line without an end.
    with _sending:
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


def _messages(
    lines: "Queue[str]", doing: str, timeout: float, progress: Progress, advice: str
) -> Iterator[dict[str, Any]]:
    """The child's messages until it ends, but for those on its progress, which are passed on."""
    last, since = (0, 0, "", ""), time.monotonic()
    while True:
        try:
            line = lines.get(timeout=timeout)
        except Empty:
            raise Dots1Error(
                f"gave up {doing}, because nothing happened for {timeout:.0f} seconds"
                f"{_during(last[3])}; {advice}"
            ) from None
        if not line:
            return
        message = _parsed(line, doing)
        if "progress" in message:
            last, since = message["progress"], time.monotonic()
            progress(*last)
        elif "computing" in message:
            seconds = time.monotonic() - since
            if seconds > _PATIENCE:
                raise Dots1Error(
                    f"gave up {doing}, because one step took more than {_PATIENCE:.0f} seconds"
                    f"{_during(last[3])}; {advice}"
                )
            if seconds > _LONG:
                progress(*last[:3], f"{last[3]} (for {seconds:.0f} s)".lstrip())
        else:
            yield message


def _during(step: str) -> str:
    return f" ({step})" if step else ""


def _parsed(line: str, doing: str) -> dict[str, Any]:
    try:
        message = parse_json(line.encode())
    except JsonError:
        message = None
    if not isinstance(message, dict):
        raise Dots1Error(f"the engine's answer made no sense while {doing}; try again")
    return message


def _read(stream: IO[str], lines: "Queue[str]") -> None:
    while line := stream.readline(_MAX_LINE):
        if line.startswith(_MARK):
            lines.put(line.removeprefix(_MARK))
    lines.put("")


def _cause(code: int, log: IO[str]) -> str:
    """How the process ended, and its last line; after a signal, its last complaint if any."""
    lines = _lines(log)
    if code >= 0:
        return readable(_SOURCE.sub("", lines[-1])) if lines else f"exit code {code}"
    ended = f"killed by signal {-code} ({signal.strsignal(-code) or 'unknown'})"
    complaints = [line for line in lines if _SOURCE.match(line) or _COMPLAINT.search(line)]
    said = f", after it logged: {readable(_SOURCE.sub('', complaints[-1]))}" if complaints else ""
    return ended + said


def _lines(log: IO[str]) -> list[str]:
    log.seek(0)
    return [line.strip() for line in log.read()[-_MAX_LINE:].splitlines() if line.strip()]


def _advice(devices: Sequence[str]) -> str:
    """What to do about drivers of the named devices, or of all that this build can use."""
    if any(name.startswith("RPC") for name in devices):
        return "look at the worker, and start it again"
    hide = " or ".join(hiding_variables(devices))
    return (
        f"if a driver is to blame, repair it or hide its devices ({hide})" if hide else "try again"
    )
