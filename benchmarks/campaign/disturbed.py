"""A verb of `dots1`, run under a fault or a limit, and what must hold then and afterwards."""

import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from threading import Thread

from benchmarks.campaign.asking import answer_once
from benchmarks.campaign.disturbed_cases import CASES, Case
from benchmarks.campaign.inputs import TEXT, TINY, inputs, one_at_a_time
from benchmarks.campaign.limits import NO_LIMITS, Limits
from benchmarks.campaign.processes import Place, Program
from benchmarks.campaign.trial import Broken
from tests.hub_server import HubServer
from tests.workers import free_port

__all__ = ["Disturbance", "Outcome", "check", "check_again", "contents", "prepare", "run",
           "undisturbed"]  # fmt: skip

_PATIENCE = 240  # seconds after which a program hangs
_TOPS = "work", "home", "temporary", "inputs"
# What a later run may add to: perplexities that were measured and are kept.
_KEPT = "home/.cache/dots1/perplexity"


@dataclass(frozen=True)
class Disturbance:
    """What is held against a program: variables of `faults.c`, limits, a file as its stdout, and
    what runs beside it."""

    variables: Mapping[str, str] | None = None
    limits: Limits = NO_LIMITS
    stdout: str | None = None
    during: Callable[[], None] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a program ended; `grown` is the bytes of addresses that it had at most, less those at
    its start."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    grown: int


def run(name: str, place: Place, disturbance: Disturbance = Disturbance()) -> Outcome:
    """Run the command of this name, and wait for its end."""
    case, output = CASES[name], place.folder / "stdout"
    for path in (place.log, output):
        path.unlink(missing_ok=True)
    with _hub(case) as variables:
        environment = {"PYTHONHASHSEED": "0", **variables, **(disturbance.variables or {})}
        arguments = [str(free_port()) if word == "PORT" else word for word in case.arguments]
        program = Program(
            place, arguments, environment, limit=_PATIENCE, limits=disturbance.limits,
            stdout=disturbance.stdout or str(output),
        )  # fmt: skip
        beside = Thread(target=disturbance.during or (lambda: None))
        beside.start()
        if case.serves:
            _ask_and_end(case, place, program)
        code, measure = program.measure()
        beside.join()
    with suppress(ProcessLookupError):
        program.ended()
    said = place.log.read_text(errors="replace") if place.log.exists() else ""
    if code == 124:
        raise Broken(f"it hangs; stderr ends with: {said[-300:]!r}")
    data = output.read_text(errors="replace") if output.exists() else ""
    return Outcome(code, data, said, measure.seconds, measure.addresses)


def _ask_and_end(case: Case, place: Place, program: Program) -> None:
    """Ask a server for an answer, and then to end."""

    def listening() -> bool:
        return place.log.exists() and "127.0.0.1:" in place.log.read_text(errors="replace")

    if case.serves == "answers":
        return answer_once(place, program, TEXT[:900])
    program.wait(listening)
    with suppress(ProcessLookupError):
        program.signal(signal.SIGTERM)


@contextmanager
def _hub(case: Case) -> Iterator[dict[str, str]]:
    if not case.hub:
        yield {}
        return
    with HubServer(TINY) as hub:
        yield {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": ""}


def contents(place: Place) -> dict[str, str]:
    """SHA-256 of the files of a place, those of its inputs too."""
    return place.contents(*_TOPS)


def check(
    name: str,
    place: Place,
    outcome: Outcome,
    what: str,
    *,
    touched: Sequence[str] = (),
    cause: str = "",
) -> None:
    """Hold a disturbed run against what must hold.

    A run that fails names the `cause`, a regular expression. `touched` are files that were changed
    beside it.
    """
    said = f"{what}: code {outcome.code}, {outcome.stderr[-400:]!r}"
    if broken := _wrongly_said(CASES[name], outcome, undisturbed(name)[1], what, cause):
        raise Broken(f"{broken}; {said}")
    if broken := _wrong_file(name, place, bool(outcome.code), touched):
        raise Broken(f"{broken}; {said}")


def _wrongly_said(case: Case, outcome: Outcome, usual: Outcome, what: str, cause: str) -> str:
    ours = [line for line in outcome.stderr.splitlines() if line.startswith("dots1: ")]
    expected = set(_shapes(usual.stderr))
    other = [line for line in outcome.stderr.splitlines()
             if line.strip() and line not in ours and _shape(line) not in expected]  # fmt: skip
    if outcome.code < 0:
        return f"killed by signal {-outcome.code}"
    if "Traceback" in outcome.stderr or any(re.match(r"\w*Error\b", line) for line in other):
        return "a traceback"
    if outcome.code and len(ours) != 1 and "closed" not in what:
        return f"{len(ours)} sentences"
    if outcome.code and cause and not re.search(cause, ours[0]):
        return "the sentence does not name its cause"
    same = not case.same or "stdout" in what or _shapes(outcome.stdout) == _shapes(usual.stdout)
    return "" if outcome.code or same else f"success with other data: {outcome.stdout[-300:]!r}"


def _wrong_file(name: str, place: Place, failed: bool, touched: Sequence[str]) -> str:
    case, (before, _, after), now = CASES[name], undisturbed(name), contents(place)
    if case.grows and not case.holds(place.folder / case.grows):
        return f"{case.grows} has lost what it had"
    for path in (before.keys() | after.keys()) - {*touched, case.grows}:
        found, output = now.get(path), case.same and path.startswith("work/")
        if path in before and found != before[path] and not (output and found == after.get(path)):
            return f"{path} is changed"
        if output and path not in before and found not in (None, after[path]):
            return f"{path} has its name and other bytes"
        if output and not failed and found != after.get(path):
            return f"success without {path}"
    return ""


def check_again(name: str, place: Place, what: str) -> None:
    """Run the command without a fault; it must come to the bytes of an undisturbed run."""
    case, (_, _, after) = CASES[name], undisturbed(name)
    outcome = run(name, place)
    if outcome.code and not re.search("exists|not empty", outcome.stderr):
        raise Broken(f"afterwards: {outcome.code}, {outcome.stderr[-400:]!r}; after {what}")
    now = contents(place)
    if stray := sorted(path for path in now.keys() - after.keys() if not path.startswith(_KEPT)):
        raise Broken(f"left behind: {', '.join(stray)}; after {what}")
    if case.grows and not case.holds(place.folder / case.grows):
        raise Broken(f"{case.grows} has lost what it had; after {what}")
    if case.same:
        wrong = [path for path, digest in after.items()
                 if path.startswith("work/") and now.get(path) != digest]  # fmt: skip
        if wrong:
            raise Broken(f"other bytes: {', '.join(wrong)}; after {what}")


def _shapes(text: str) -> list[str]:
    return [_shape(line) for line in text.splitlines()]


def _shape(line: str) -> str:
    return re.sub(r"[\d.,]+(\s?[kKMG]?B)?", "0", line.strip())


def undisturbed(name: str) -> tuple[dict[str, str], Outcome, dict[str, str]]:
    """What is there before, how the run ends, and what is there afterwards."""
    with one_at_a_time:
        return _undisturbed(name)


@cache
def _undisturbed(name: str) -> tuple[dict[str, str], Outcome, dict[str, str]]:
    place = Place(inputs() / "undisturbed" / re.sub(r"\W+", "-", name))
    prepare(name, place)
    before = contents(place)
    outcome = run(name, place)
    if outcome.code:
        raise Broken(f"the undisturbed run ended with {outcome.code}: {outcome.stderr[-300:]}")
    return before, outcome, contents(place)


def prepare(name: str, place: Place) -> None:
    """Copy a case's inputs into a place, and what an earlier run left."""
    case = CASES[name]
    for made in case.inputs:
        source, to = made(), place.folder / "inputs" / made().name
        to.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, to)
        else:
            shutil.copy(source, to)
    case.earlier(place.work)
