"""The costs of a process: wall time, processor time, private memory, bytes read and written.

Linux only: the figures come from /proc.
"""

import os
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Usage", "forget", "measure"]

_POLL = 0.02  # seconds


@dataclass(frozen=True)
class Usage:
    """One run of a process with all its threads.

    `read` and `written` are what the process asked the kernel for; `disk_read` and `disk_written`
    are whole pages that came from or are bound for the disk, mapped files included.
    """

    wall: float
    processor: float
    anonymous: int  # peak of RssAnon: memory that no file backs
    read: int
    written: int
    disk_read: int
    disk_written: int


def measure(command: Sequence[str], log: Path) -> Usage:
    """Run `command` to its end, with its output in `log`.

    Raises:
        RuntimeError: it failed; the message ends with the last lines of its output.
    """
    with open(log, "wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            peak = _watch(process.pid)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall = time.perf_counter() - start
        counters = _fields(process.pid, "io")  # a zombie still has them
        _, status, resources = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise RuntimeError(f"{' '.join(command[:3])} ... failed ({process.returncode}):\n{tail}")
    return Usage(
        wall,
        resources.ru_utime + resources.ru_stime,
        peak,
        *(counters[key] for key in ("rchar", "wchar", "read_bytes", "write_bytes")),
    )


def _watch(pid: int) -> int:
    """Wait until the process has exited, without reaping it; returns its peak RssAnon in bytes."""
    peak = 0
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        peak = max(peak, _fields(pid, "status").get("RssAnon", 0) * 1024)
        time.sleep(_POLL)
    return peak


def _fields(pid: int, name: str) -> dict[str, int]:
    """The numeric lines of /proc/PID/name."""
    found = {}
    for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
        key, _, value = line.partition(":")
        number = value.split()[:1]
        if number and number[0].isdigit():
            found[key] = int(number[0])
    return found


def forget(paths: Iterable[Path]) -> None:
    """Drop files from the page cache, so that every run starts with a cold cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)  # only clean pages can be dropped
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
