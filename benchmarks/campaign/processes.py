"""`dots1` in processes that can be killed at a moment, a byte or a file operation, or limited.

They are forked from a process that has imported the package, and so start in milliseconds. It has
the library of `faults.c`, which does nothing unless a program's variables ask for it.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context, set_start_method
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from random import Random
from threading import RLock
from typing import Any

from benchmarks.campaign.limits import NO_LIMITS, Limits, addresses

__all__ = ["Measure", "Place", "Program", "Strike", "faults"]

# huggingface_hub reads its environment when it is imported, so it is left out.
_PRELOAD = [
    "benchmarks.campaign.processes", "dots1_local.calibrate.calibrate", "dots1_local.chat.session",
    "dots1_local.cli", "dots1_local.convert", "dots1_local.convert.refining",
    "dots1_local.evaluate.perplexity", "dots1_local.export", "dots1_local.refine.kernels",
    "dots1_local.serve.run", "dots1_local.verify",
]  # fmt: skip
_starting = RLock()

# Python's audit events of what changes a folder; each comes before the change.
_OPERATIONS = {"os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink",
               "os.truncate", "os.utime"}  # fmt: skip
_PATIENCE = 240  # seconds; only a hanging program needs so long
_ORPHANS = 30  # seconds in which child processes of a killed program end


@dataclass(frozen=True)
class Place:
    """Where a program runs: in `work`, with its own home and folder for temporary files."""

    folder: Path

    def __post_init__(self) -> None:
        for path in (self.work, self.home, self.temporary):
            path.mkdir(parents=True, exist_ok=True)

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def temporary(self) -> Path:
        return self.folder / "temporary"

    @property
    def log(self) -> Path:
        """What programs say, on stdout and stderr."""
        return self.folder / "log"

    def contents(self, *tops: str, by_name: Sequence[str] = ()) -> dict[str, str]:
        """SHA-256 of all files by path; a folder that is empty, and a file `by_name`, has none."""
        found = {}
        for top in tops or ("work", "home", "temporary"):
            for path in sorted((self.folder / top).rglob("*")):
                name = path.relative_to(self.folder).as_posix()
                if path.is_file():
                    named = path.name in by_name
                    found[name] = "" if named else hashlib.sha256(path.read_bytes()).hexdigest()
                elif path.is_dir() and not any(path.iterdir()):
                    found[name] = "empty folder"
        return found

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        return kept | {
            "HOME": str(self.home), "TMPDIR": str(self.temporary), "LANG": "C.UTF-8",
            "TERM": "xterm-256color", "COLUMNS": "100", "OMP_NUM_THREADS": "1", "NO_PROXY": "*",
            "PROMPT_TOOLKIT_NO_CPR": "1", **more,
        }  # fmt: skip

    def said(self) -> str:
        """The last line of the log."""
        lines = self.log.read_text(errors="replace").split("\n") if self.log.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


@dataclass(frozen=True)
class Measure:
    """What a program took: seconds, bytes written, file operations, and bytes of addresses."""

    seconds: float
    nbytes: int
    operations: int
    addresses: int


@dataclass(frozen=True)
class Strike:
    """When a program is killed: after some seconds, bytes written or file operations.

    `group` kills its child processes, too.
    """

    seconds: float | None = None
    nbytes: int | None = None
    operation: int | None = None
    group: bool = True

    @classmethod
    def drawn(cls, random: Random, measure: Measure) -> "Strike":
        """Draw one that comes before the program's end, if it runs as it did when measured."""
        group = random.random() < 0.75
        match random.choice(["moment", "byte", "operation"]):
            case "moment":
                return cls(seconds=random.uniform(0, measure.seconds), group=group)
            case "byte":
                return cls(nbytes=random.randrange(max(measure.nbytes, 1)), group=group)
            case _:
                return cls(operation=random.randrange(max(measure.operations, 1)), group=group)


@dataclass
class Program:
    """`dots1` with `arguments`, in a process group of its own.

    `terminal` is its controlling one; else stderr goes to the log, and stdout, too, if it has no
    file of its own, or is "closed".
    """

    place: Place
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    operation: int | None = None
    terminal: str | None = None
    limit: float = _PATIENCE
    stdout: str | None = None
    limits: Limits = NO_LIMITS

    def __post_init__(self) -> None:
        env = self.place.environment(self.environment)
        self._counted, self._bytes = self.place.folder / "measured", 0
        given = list(self.arguments), str(self.place.work), env, str(self._counted)
        streams = str(self.place.log), self.stdout, self.terminal
        self._process: ForkServerProcess = _server().Process(
            target=_run, args=(*given, *streams, self.operation, self.limits), daemon=False
        )
        self._started = time.monotonic()
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def measure(self) -> tuple[int, Measure]:
        """Wait for the end; return the exit code and what the program took."""
        code = self.wait(lambda: False)
        seconds = time.monotonic() - self._started
        try:
            counts = json.loads(self._counted.read_text())
        except (OSError, ValueError):  # it was killed
            counts = [0, 0]
        return code, Measure(seconds, self._bytes, *counts)

    def wait(self, done: Callable[[], bool] = lambda: False) -> int:
        """Wait for the end, and return the exit code, or for what is `done`, and return 0."""
        while self._process.is_alive():
            self.written()
            if done():
                return 0
            if time.monotonic() - self._started > self.limit:
                self.kill()
                return 124
            time.sleep(0.005)
        self._process.join()
        self.limits.clean_up(self.pid)
        return self._process.exitcode or 0

    def meets(self, strike: Strike, done: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the strike, and return True; False if the program ends before or is `done`."""
        while self._process.is_alive() and not done():
            if strike.seconds is not None and time.monotonic() - self._started > strike.seconds:
                break
            if strike.nbytes is not None and self.written() > strike.nbytes:
                break
            if time.monotonic() - self._started > self.limit:
                break
            time.sleep(0.0005)
        else:
            self._process.join(timeout=0)
            return self._process.exitcode == -signal.SIGKILL and self.ended()
        return self.kill(group=strike.group)

    def kill(self, *, group: bool = True) -> bool:
        """Kill the program; return whether all its processes have ended some time later."""
        (os.killpg if group and self.leads() else os.kill)(self.pid, signal.SIGKILL)
        self._process.join()
        return self.ended()

    def leads(self) -> bool:
        """Whether the process has its own group already."""
        try:
            return os.getpgid(self.pid) == self.pid
        except ProcessLookupError:
            return False

    def ended(self) -> bool:
        deadline = time.monotonic() + _ORPHANS
        while _of_session(self.pid):
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes outlive their parent: {_of_session(self.pid)}")
            time.sleep(0.01)
        return True

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def written(self) -> int:
        """The bytes that the process has written so far."""
        try:
            for line in Path(f"/proc/{self.pid}/io").read_text().splitlines():
                if line.startswith("wchar: "):
                    self._bytes = int(line.split()[1])
        except OSError:
            pass
        return self._bytes


@cache
def faults() -> Path:
    """The library of `faults.c`, compiled."""
    _kept.append(tempfile.TemporaryDirectory(prefix="dots1-faults-"))
    library = Path(_kept[0].name, "faults.so")
    source = Path(__file__).with_name("faults.c")
    compiler = shutil.which("cc") or "gcc"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _server() -> ForkServerContext:
    with _starting:
        return _started()


@cache
def _started() -> ForkServerContext:
    """The process that programs are forked from."""
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    os.environ["LD_PRELOAD"] = str(faults())
    try:
        process = context.Process(target=os.getpid)
        process.start()
        process.join()
    finally:
        del os.environ["LD_PRELOAD"]
    return context


def _of_session(leader: int) -> list[str]:
    """The processes of a session that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, session = rest.split()[:4]
        if int(session) == leader and state != "Z":
            found.append(f"{name.partition('(')[2]} ({path.parent.name})")
    return found


def _run(
    arguments: list[str],
    folder: str,
    env: dict[str, str],
    measured: str,
    log: str,
    stdout: str | None,
    terminal: str | None,
    operation: int | None,
    limits: Limits,
) -> None:
    """Be the program; at the file operation of this number, it kills its group."""
    os.setsid()
    before = addresses()
    for number, stream in enumerate(_streams(log, stdout, terminal)):
        os.dup2(stream, number)
    kept = os.open(measured, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    tempfile.tempdir = None  # found again in the new environment
    set_start_method("fork", force=True)  # the default, in programs that are not forked here
    sys.argv = ["dots1", *arguments]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 -- they stay open
    sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from dots1_local.cli import main

    operations = 0

    def count(event: str, given: tuple[Any, ...]) -> None:
        nonlocal operations
        if event in _OPERATIONS or (event == "open" and _writes(given)):
            if operations == operation:
                os.killpg(0, signal.SIGKILL)
            operations += 1

    limits.hold()
    sys.addaudithook(count)
    try:
        main()
    finally:
        with suppress(OSError):  # stdout may be closed, or full
            sys.stdout.flush()
        sys.stderr.flush()
        peak = re.search(r"VmPeak:\s+(\d+)", Path("/proc/self/status").read_text())
        grown = int(peak[1]) * 1024 - before if peak else 0
        os.write(kept, json.dumps([operations, grown]).encode())


def _streams(log: str, stdout: str | None, terminal: str | None) -> list[int]:
    """Descriptors of stdin, stdout and stderr."""
    if terminal:
        return [os.open(terminal, os.O_RDWR)] * 3
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    errors = os.open(log, append, 0o666)
    if stdout == "closed":
        reader, output = os.pipe()
        os.close(reader)
    else:
        output = os.open(stdout, append, 0o666) if stdout else errors
    return [os.open(os.devnull, os.O_RDWR), output, errors]


def _writes(given: tuple[Any, ...]) -> bool:
    """Whether `open` may change the file; descriptors and the terminal do not count."""
    path, mode, flags = given
    changes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    changes |= any(sign in (mode or "") for sign in "wax+")
    return changes and not isinstance(path, int) and not str(path).startswith("/dev/")
