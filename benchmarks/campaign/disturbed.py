"""Each verb of `dots1`, run under a fault or a limit, and what must hold then and afterwards.

Programs are forked from a process that has imported the package, and so start in milliseconds.
"""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPConnection, HTTPException
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from threading import RLock, Thread

from benchmarks.campaign.trial import Broken
from tests.hub_server import NAME, HubServer
from tests.micro import micro_checkpoint
from tests.verify.patch import rewrite

__all__ = [
    "CASES",
    "Case",
    "Limits",
    "Outcome",
    "Place",
    "check",
    "check_again",
    "prepare",
    "run",
    "undisturbed",
]

TINY = Path(__file__).parents[2] / "examples" / "dots1-tiny"
_PRELOAD = [
    "benchmarks.campaign.disturbed", "dots1_local.calibrate.calibrate", "dots1_local.chat.session",
    "dots1_local.cli", "dots1_local.convert", "dots1_local.convert.refining",
    "dots1_local.evaluate.perplexity", "dots1_local.export", "dots1_local.serve.run",
    "dots1_local.verify",
]  # fmt: skip
_PATIENCE = 120  # seconds after which a program hangs
_lock = RLock()


@dataclass(frozen=True)
class Limits:
    """What is held against a program: variables of the library, the disk, stdout and memory.

    `address_space` and `cgroup` are bytes more than a forked program has; `user` is a user's
    number; `during` runs beside the program.
    """

    variables: Mapping[str, str] = field(default_factory=dict)
    stdout: str | None = None
    file_size: int | None = None
    address_space: int | None = None
    cgroup: int | None = None
    user: int | None = None
    during: Callable[[], None] | None = None


@dataclass(frozen=True)
class Place:
    """Where a program runs: in `work`, with inputs beside it, its own home and temporary folder."""

    folder: Path

    def __post_init__(self) -> None:
        for name in ("work", "home", "temporary", "inputs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def contents(self, *tops: str) -> dict[str, str]:
        """SHA-256 of files by path; a folder that is empty has none."""
        found = {}
        for top in tops or ("work", "home", "temporary", "inputs"):
            for path in sorted((self.folder / top).rglob("*")):
                name = path.relative_to(self.folder).as_posix()
                if path.is_file():
                    found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
                elif path.is_dir() and not any(path.iterdir()):
                    found[name] = "empty folder"
        return found


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `peak` is the most address space it had, and `grown` what it added."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    grown: int = 0


@dataclass(frozen=True)
class Case:
    """A command, and the inputs that it names; `talk` is done with a server that it is."""

    arguments: tuple[str, ...]
    inputs: tuple[Callable[[], Path], ...] = ()
    hub: bool = False
    same: bool = True  # the output's bytes are the same each time
    talk: Callable[[str], bool] | None = None


def run(case: Case, place: Place, limits: Limits = Limits()) -> Outcome:
    """Run a command, and wait for its end."""
    with _hub(case) as variables:
        environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH")} | {
            "HOME": str(place.folder / "home"), "TMPDIR": str(place.folder / "temporary"),
            "LANG": "C.UTF-8", "TERM": "dumb", "COLUMNS": "100", "OMP_NUM_THREADS": "1",
            "NO_PROXY": "*", "PYTHONHASHSEED": "0", **variables, **limits.variables,
        }  # fmt: skip
        log = place.folder / "stderr"
        out = place.folder / "stdout"
        measured = place.folder / "measured"
        for path in (log, out, measured):
            path.unlink(missing_ok=True)
            path.touch(0o666)
        os.chmod(place.folder, 0o755)
        given = (list(case.arguments), str(place.folder), environment, limits.stdout)
        sizes = limits.file_size, limits.address_space, limits.cgroup, limits.user
        process = _server().Process(target=_run, args=(*given, *sizes))
        start = time.monotonic()
        process.start()
        helper = Thread(target=limits.during) if limits.during else None
        if helper:
            helper.start()
        if case.talk:
            _talk(case, process, log)
        process.join(_PATIENCE)
        hangs = process.is_alive()
        if process.pid:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.join()
        if helper:
            helper.join()
        if hangs:
            raise Broken(f"it hangs; stderr ends with: {log.read_text(errors='replace')[-300:]}")
        return Outcome(
            process.exitcode or 0, out.read_text(errors="replace"),
            log.read_text(errors="replace"), time.monotonic() - start,
            int(measured.read_text() or 0),
        )  # fmt: skip


@cache
def _server() -> ForkServerContext:
    """The process that programs are forked from; it has the library of faults."""
    library = _inputs() / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", library, source, "-ldl"],
                   check=True)  # fmt: skip
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    os.environ["LD_PRELOAD"] = str(library)
    try:
        process = context.Process(target=os.getpid)
        process.start()
        process.join()
    finally:
        del os.environ["LD_PRELOAD"]
    return context


def _talk(case: Case, process: ForkServerProcess, log: Path) -> None:
    """Wait for a server's address, talk to it, and ask it to end."""
    assert case.talk
    assert process.pid
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        said = log.read_text(errors="replace")
        if (found := re.search(r"127\.0\.0\.1:(\d+)", said)) and case.talk(found[1]):
            break
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)


def _complete(port: str) -> bool:
    body = json.dumps({"prompt": _text().read_text()[:900], "max_tokens": 4, "temperature": 0})
    server = HTTPConnection("127.0.0.1", int(port), timeout=60)
    try:
        server.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = server.getresponse()
        response.read()
        return response.status != 503
    except (OSError, HTTPException):
        return False
    finally:
        server.close()


def _run(
    arguments: Sequence[str], folder: str, env: Mapping[str, str], stdout: str | None,
    file_size: int | None, address_space: int | None, cgroup: int | None, user: int | None,
) -> None:  # fmt: skip
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    place, before = Path(folder), _virtual()
    streams = [os.open(os.devnull, os.O_RDONLY)]
    if stdout == "closed":
        reader, writer = os.pipe()
        os.close(reader)
        streams.append(writer)
    else:
        streams.append(os.open(stdout or place / "stdout", os.O_WRONLY | os.O_APPEND))
    streams.append(os.open(place / "stderr", os.O_WRONLY | os.O_APPEND))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(place / "work")
    sys.argv = ["dots1", *arguments]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
    tempfile.tempdir = None
    measured = os.open(place / "measured", os.O_WRONLY)
    if cgroup is not None:
        group = Path(f"/sys/fs/cgroup/memory/dots1-campaign-{os.getpid()}")
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(cgroup))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    for kind, size in ((resource.RLIMIT_FSIZE, file_size),
                       (resource.RLIMIT_AS, address_space and address_space + before)):  # fmt: skip
        if size is not None:
            resource.setrlimit(kind, (size, size))
    for name in [name for name in os.environ if name != "LD_PRELOAD"]:
        del os.environ[name]
    os.environ.update(env)
    from dots1_local.cli import main

    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        peak = re.search(r"VmPeak:\s+(\d+)", Path("/proc/self/status").read_text())
        os.write(measured, str(int(peak[1]) * 1024 - before if peak else 0).encode())


def _virtual() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def check(
    name: str, place: Place, outcome: Outcome, what: str, *, touched: Sequence[str] = ()
) -> None:
    """Hold a disturbed run against what must hold, and the same command afterwards."""
    case, expected = CASES[name], undisturbed(name)
    said = f"{what}: code {outcome.code}, {outcome.stderr[-400:]!r}"
    ours = [line for line in outcome.stderr.splitlines() if line.startswith("dots1: ")]
    usual = {_shape(line) for line in expected[1].stderr.splitlines()}
    other = [line for line in outcome.stderr.splitlines()
             if line.strip() and line not in ours and _shape(line) not in usual]  # fmt: skip
    if outcome.code < 0:
        raise Broken(f"killed by signal {-outcome.code}; {said}")
    if "Traceback" in outcome.stderr or any(re.match(r"\w*Error\b", line) for line in other):
        raise Broken(f"a traceback; {said}")
    if outcome.code and len(ours) != 1 and "closed" not in what:
        raise Broken(f"{len(ours)} sentences; {said}")
    now = place.contents()
    before = expected[0]
    finals = {path: digest for path, digest in expected[2].items() if path.startswith("work/")}
    if case.same:
        for path, digest in finals.items():
            if path in now and now[path] != digest:
                raise Broken(f"{path} has its name and other bytes; {said}")
            if not outcome.code and path not in now:
                raise Broken(f"success without {path}; {said}")
    for path, digest in before.items():
        if now.get(path) != digest and path not in touched:
            raise Broken(f"{path} is changed; {said}")


def check_again(name: str, place: Place, what: str) -> None:
    """Run the command without a fault; it must come to the bytes of an undisturbed run."""
    case, expected = CASES[name], undisturbed(name)
    outcome = run(case, place)
    if outcome.code and not re.search("exists|not empty", outcome.stderr):
        raise Broken(f"afterwards: {outcome.code}, {outcome.stderr[-400:]!r}; after {what}")
    now = place.contents()
    if stray := sorted(path for path in now.keys() - expected[2].keys()
                       if not path.startswith("home/.cache/dots1/perplexity")):  # fmt: skip
        raise Broken(f"left behind: {', '.join(stray)}; after {what}")
    if case.same:
        wrong = [path for path, digest in expected[2].items()
                 if path.startswith("work/") and now.get(path) != digest]  # fmt: skip
        if wrong:
            raise Broken(f"other bytes: {', '.join(wrong)}; after {what}")


def _shape(line: str) -> str:
    return re.sub(r"[\d.,]+(\s?[kKMG]?B)?", "0", line.strip())


def undisturbed(name: str) -> tuple[dict[str, str], Outcome, dict[str, str]]:
    """What is there before, how the run ends, and what is there afterwards."""
    with _lock:
        return _undisturbed(name)


@cache
def _undisturbed(name: str) -> tuple[dict[str, str], Outcome, dict[str, str]]:
    place = Place(_inputs() / "undisturbed" / re.sub(r"\W+", "-", name))
    prepare(name, place)
    before = place.contents()
    outcome = run(CASES[name], place)
    if outcome.code:
        raise Broken(f"the undisturbed run ended with {outcome.code}: {outcome.stderr[-300:]}")
    return before, outcome, place.contents()


def prepare(name: str, place: Place) -> None:
    """Copy a case's inputs into a place."""
    for made in CASES[name].inputs:
        with _lock:
            source = made()
        to = place.folder / "inputs" / source.name
        if source.is_dir():
            shutil.copytree(source, to)
        else:
            shutil.copy(source, to)


@contextmanager
def _hub(case: Case) -> Iterator[dict[str, str]]:
    if not case.hub:
        yield {}
        return
    with HubServer(TINY) as hub:
        yield {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": ""}


# Inputs that trials share


@cache
def _inputs() -> Path:
    _kept.append(tempfile.TemporaryDirectory(prefix="dots1-faults-"))
    return Path(_kept[0].name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _made(name: str, *arguments: str) -> Path:
    place = Place(_inputs() / "made")
    path = place.folder / "work" / name
    if not path.exists() and (outcome := run(Case(arguments), place)).code:
        raise Broken(f"{name} cannot be made: {outcome.stderr}")
    return path


def _tiny() -> Path:
    return TINY


def _q8() -> Path:
    return _made("q8.gguf", "convert", str(TINY), "-o", "q8.gguf", "--type", "Q8_0")


def _micro() -> Path:
    path = _inputs() / "micro"
    return path if path.exists() else micro_checkpoint(path, shards=2)


def _text() -> Path:
    path = _inputs() / "text.txt"
    if not path.exists():
        path.write_text((TINY / "heldout.txt").read_text(encoding="utf-8")[:6000])
    return path


def _calibrated() -> Path:
    _made("calibrated/calibration.json", "calibrate", str(_micro()), "-o", "calibrated", "-f",
          str(_text()), "-c", "64", "--chunks", "4", "--refine", "-t", "1")  # fmt: skip
    return _inputs() / "made/work/calibrated"


def _wrong() -> Path:
    path = _inputs() / "wrong.gguf"
    if not path.exists():
        rewrite(_q8(), path, remove=["dots1.expert_gating_func"])
    return path


_Q8 = "../inputs/q8.gguf"
_TO_Q8 = ("convert", "../inputs/dots1-tiny", "-o", "out.gguf", "--type", "Q8_0", "-t", "1")
_REST = ("-t", "1", "-c", "512")
CASES: dict[str, Case] = {
    "convert": Case(_TO_Q8, (_tiny,)),
    "convert --split-max-size": Case((*_TO_Q8, "--split-max-size", "5M"), (_tiny,)),
    "convert --refine": Case(
        ("convert", "../inputs/micro", "-o", "out.gguf", "--type", "Q4_K_M", "--refine", "-t", "1",
         "--calibration", "../inputs/calibrated"), (_micro, _calibrated)),
    "convert from a hub": Case(("convert", NAME, "-o", "out.gguf", "--type", "Q8_0", "-t", "1"),
                               hub=True),
    "calibrate": Case(("calibrate", "../inputs/micro", "-o", "cal", "-f", "../inputs/text.txt",
                       "-c", "64", "--chunks", "4", "-t", "1"), (_micro, _text)),
    "export": Case(("export", _Q8, "-o", "out", "--shard-size", "8MB"), (_q8,)),
    "inspect": Case(("inspect", _Q8), (_q8,)),
    "plan": Case(("plan", _Q8), (_q8,)),
    "verify --fix": Case(("verify", "../inputs/wrong.gguf", "--quick", "--fix", "fixed.gguf"),
                         (_wrong,)),
    "perplexity": Case(("perplexity", _Q8, "-f", "../inputs/text.txt", "-c", "128", "-t", "1",
                        "--save-logits", "base.kld"), (_q8, _text)),
    "evaluate": Case(("evaluate", _Q8, "--text", "stories=../inputs/text.txt", *_REST),
                     (_q8, _text), same=False),
    "chat --session": Case(("chat", _Q8, "-p", "Who is Tim?", "--session", "talk.json", "-n", "8",
                            "--temp", "0", "--draft", "off", *_REST), (_q8,), same=False),
    "serve --prompt-cache": Case(
        ("serve", _Q8, "--port", "0", "--draft", "off", "--prompt-cache", "prompts",
         "--prompt-cache-ram", "0", *_REST), (_q8,), same=False, talk=_complete),
    "bench": Case(("bench", _Q8, "-t", "1", "-c", "16"), (_q8,), same=False),
    "hardware": Case(("hardware",), same=False),
    "worker": Case(("worker", "--port", "0"), same=False, talk=lambda port: True),
}  # fmt: skip
