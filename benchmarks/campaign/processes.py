"""`dots1` in processes that can be killed at a moment, a byte or a file operation.

They are forked from a process that has imported the package, and so start in milliseconds.
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context, set_start_method
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from random import Random
from typing import Any

__all__ = ["Measure", "Place", "Program", "Strike"]

# huggingface_hub reads its environment when it is imported, so it is left out.
_PRELOAD = [
    "benchmarks.campaign.processes", "dots1_local.calibrate.calibrate", "dots1_local.chat.session",
    "dots1_local.cli", "dots1_local.convert", "dots1_local.convert.refining",
    "dots1_local.evaluate.perplexity", "dots1_local.export", "dots1_local.refine.kernels",
    "dots1_local.serve.run", "dots1_local.verify",
]  # fmt: skip
_context = get_context("forkserver")
_context.set_forkserver_preload(_PRELOAD)

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
    """What a program that nobody disturbed took."""

    seconds: float
    nbytes: int
    operations: int


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
    """`dots1` with `arguments`, in a process group of its own; `terminal` is its controlling
    one."""

    place: Place
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    operation: int | None = None
    terminal: str | None = None
    limit: float = _PATIENCE

    def __post_init__(self) -> None:
        env = self.place.environment(self.environment)
        counted = self.place.folder / "operations"
        given = (list(self.arguments), str(self.place.work), env, str(self.place.log))
        self._process: ForkServerProcess = _context.Process(
            target=_run, args=(*given, str(counted), self.operation, self.terminal), daemon=False
        )
        self._counted, self._bytes, self._started = counted, 0, time.monotonic()
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def measure(self) -> tuple[int, Measure]:
        """Wait for the end; return the exit code and what the program took."""
        code = self.wait(lambda: False)
        seconds = time.monotonic() - self._started
        return code, Measure(seconds, self._bytes, int(self._counted.read_text() or 0))

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
    log: str,
    counted: str,
    operation: int | None,
    terminal: str | None,
) -> None:
    """Be the program; at the file operation of this number, it kills its group."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    streams = [os.open(terminal or os.devnull, os.O_RDWR)]
    streams += [streams[0], streams[0]] if terminal else [output, output]
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
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

    sys.addaudithook(count)
    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        Path(counted).write_text(str(operations))


def _writes(given: tuple[Any, ...]) -> bool:
    """Whether `open` may change the file; descriptors and the terminal do not count."""
    path, mode, flags = given
    changes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    changes |= any(sign in (mode or "") for sign in "wax+")
    return changes and not isinstance(path, int) and not str(path).startswith("/dev/")
