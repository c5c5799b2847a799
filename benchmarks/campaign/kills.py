"""Programs that are killed with SIGKILL at a random moment, byte or file operation.

The same command then runs again. It must come to the bytes of a run that nobody disturbed, and
leave no other file, in its folder, in its home or among temporary files. A file that has its final
name at the kill must be whole. `killed_dialogues.py` has what is held with a model.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from benchmarks.campaign.inputs import (
    calibrated,
    inputs,
    micro,
    mini,
    mini_q8,
    one_at_a_time,
    q8,
    split,
    text,
    wrong,
)  # fmt: skip
from benchmarks.campaign.killed_dialogues import CHAT_TRIALS
from benchmarks.campaign.processes import Measure, Place, Program, Strike
from benchmarks.campaign.trial import Broken, Part, Trial
from tests.hub_server import NAME, HubServer

__all__ = ["PART"]

_HEADER = 1 << 19  # bytes; shards have more, and other files less
_ATTEMPTS = 20  # at a kill that comes before the end
_CHECKED_BY_NAME = (".dots1-verified.json",)  # it has times of files
_DONE = ("exists", "is not empty")  # in what a command says that has nothing left to do


@dataclass(frozen=True)
class Case:
    """A command, and what it needs in its folder before.

    `whole` are folders that appear with all that is in them. A command with `hub` fetches from a
    server, whose repository is `hub()`.
    """

    arguments: tuple[str, ...]
    prepare: Callable[[Place], None] = lambda place: None
    whole: tuple[str, ...] = ()
    hub: Callable[[], Path] | None = None


@dataclass(frozen=True)
class Undisturbed:
    """What a command leaves and what was there before, as SHA-256 by path, and what it took."""

    files: Mapping[str, str]
    before: Mapping[str, str]
    measure: Measure


def _trial(name: str) -> Trial:
    def try_once(random: Random, folder: Path) -> None:
        case, expected = _CASES[name], _undisturbed(name)
        for attempt in range(_ATTEMPTS):
            place = Place(folder / str(attempt))
            case.prepare(place)
            with _hub_of(case) as (env, hub):
                killed = 0
                for _ in range(random.choice([1, 1, 1, 2, 3])):
                    killed += _killed_once(random, case, expected, place, env)
                if killed:
                    _again(case, expected, place, env, hub)
                    return
            shutil.rmtree(place.folder)
        raise Broken(f"the command ended before each of {_ATTEMPTS} kills")

    return try_once


def _killed_once(
    random: Random, case: Case, expected: Undisturbed, place: Place, env: Mapping[str, str]
) -> bool:
    strike = Strike.drawn(random, expected.measure)
    program = Program(place, case.arguments, env, strike.operation)
    if not program.meets(strike):
        return False
    found = place.contents(by_name=_CHECKED_BY_NAME)
    for path, digest in found.items():
        whole = expected.files.get(path, digest), expected.before.get(path)
        if path.startswith("work/") and digest not in whole:
            raise Broken(f"{path} had its name before it was whole, after {strike}")
    for top in case.whole:
        inside = {path for path in expected.files if path.startswith(f"work/{top}/")}
        if (place.work / top).exists() and not inside <= found.keys():
            raise Broken(f"{top} had its name before it was whole, after {strike}")
    return True


def _again(
    case: Case, expected: Undisturbed, place: Place, env: Mapping[str, str], hub: HubServer | None
) -> None:
    _age(place)
    before, arrived = place.contents(by_name=_CHECKED_BY_NAME), _arrived(place)
    if hub:
        hub.requests.clear()
    code = Program(place, case.arguments, env).wait()
    complete = all(before.get(path) == digest for path, digest in expected.files.items()
                   if path.startswith("work/"))  # fmt: skip
    refused = complete and any(words in place.said() for words in _DONE)
    if code and not refused:
        raise Broken(f"the second run ended with {code}: {place.said()}")
    found = place.contents(by_name=_CHECKED_BY_NAME)
    if stray := sorted(found.keys() - expected.files.keys()):
        raise Broken(f"left behind: {', '.join(stray)}{' (refused)' * refused}")
    if missing := sorted(expected.files.keys() - found.keys()):
        raise Broken(f"missing: {', '.join(missing)}")
    if wrong := sorted(path for path in found if found[path] != expected.files[path]):
        raise Broken(f"other bytes: {', '.join(wrong)}")
    if hub and case.hub:
        size = sum(path.stat().st_size for path in case.hub().iterdir() if _is_shard(path))
        fetched = sum(hub.shard_bytes().values())
        if fetched > size - arrived:
            raise Broken(f"{arrived:,} of {size:,} bytes were there, and {fetched:,} came again")


def _undisturbed(name: str) -> Undisturbed:
    with one_at_a_time:
        return _measured(name)


@cache
def _measured(name: str) -> Undisturbed:
    case, place = _CASES[name], Place(inputs() / f"undisturbed-{name.replace('/', '-')}")
    case.prepare(place)
    before = place.contents(by_name=_CHECKED_BY_NAME)
    with _hub_of(case) as (env, _):
        code, measure = Program(place, case.arguments, env).measure()
    if code:
        raise Broken(f"the undisturbed run ended with {code}: {place.said()}")
    return Undisturbed(place.contents(by_name=_CHECKED_BY_NAME), before, measure)


def _age(place: Place) -> None:
    """Let huggingface_hub's temporary files look as if they were left an hour ago."""
    then = time.time() - 3600
    for pattern in ("blobs/tmp_*", "refs/*.tmp", "tmp*/dummy_file_*"):
        for path in place.home.rglob(pattern):
            os.utime(path, (then, then), follow_symlinks=False)


def _arrived(place: Place) -> int:
    """The bytes of shards that are on the disk, whole or not."""
    paths = [*place.home.rglob("blobs/*"), *place.work.rglob("*.shards/**/*")]
    shards = [path for path in paths if path.is_file() and path.stat().st_size > _HEADER]
    return sum(path.stat().st_size for path in shards)


def _is_shard(path: Path) -> bool:
    return path.suffix in (".gguf", ".safetensors")


@contextmanager
def _hub_of(case: Case) -> Iterator[tuple[dict[str, str], HubServer | None]]:
    if case.hub is None:
        yield {}, None
        return
    with HubServer(case.hub()) as hub:
        yield {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": ""}, hub


def _command(*arguments: str, **more: object) -> Case:
    return Case(arguments, **more)  # type: ignore[arg-type]


def _link(*made: Callable[[], Path]) -> Callable[[Place], None]:
    """Link shared inputs into the folder, by their names."""

    def prepare(place: Place) -> None:
        for each in made:
            (place.work / each().name).symlink_to(each())

    return prepare


def _with_kernels(place: Place) -> None:
    """Let a program have the compiled kernels of refinement."""
    calibrated()
    _link(micro, calibrated, text)(place)
    kernels = inputs() / "made" / "home" / ".cache" / "dots1"
    shutil.copytree(kernels, place.home / ".cache" / "dots1")


def _older_file(place: Place) -> None:
    _link(mini)(place)
    shutil.copy(mini_q8(), place.work / "out.gguf")


@cache
def _one_file() -> Path:
    """A repository with a model in one file and one in shards."""
    with one_at_a_time:
        folder = inputs() / "repository"
        folder.mkdir(exist_ok=True)
        shutil.copy(mini_q8(), folder / "tiny-Q8_0.gguf")
        for path in split().parent.glob("split-*.gguf"):
            shutil.copy(path, folder / path.name.replace("split", "tiny-Q4_K_M"))
        return folder


def _wrong_shards(place: Place) -> None:
    for path in split().parent.glob("split-*.gguf"):
        (place.work / path.name).symlink_to(path)
    first = place.work / split().name
    first.unlink()
    first.symlink_to(wrong(split()))


_TO_Q8 = ("convert", "mini", "-o", "out.gguf", "--type", "Q8_0")
_FROM_HUB = ("convert", NAME, "-o", "out.gguf", "--type", "Q8_0")
_REFINE = ("convert", "micro", "-o", "out.gguf", "--type", "Q4_K_M", "--refine", "-t", "1")
_CALIBRATE = ("calibrate", "micro", "-o", "cal", "-f", "text.txt", "-c", "64", "--chunks", "4",
              "-t", "1")  # fmt: skip

_CASES: dict[str, Case] = {
    "convert": _command(*_TO_Q8, prepare=_link(mini)),
    "convert, one thread": _command(*_TO_Q8, "-t", "1", prepare=_link(mini)),
    "convert --split-max-size": _command(
        *_TO_Q8, "--split-max-size", "1M", prepare=_link(mini)
    ),
    "convert --force": _command(*_TO_Q8[:-1], "Q5_0", "--force", prepare=_older_file),
    "convert --refine": _command(*_REFINE, "--calibration", "calibrated", prepare=_with_kernels),
    "convert --refine, compiling": _command(
        *_REFINE, "--calibration", "calibrated", prepare=_link(micro, calibrated)
    ),
    "convert --refine -f": _command(*_REFINE, "-f", "text.txt", prepare=_with_kernels),
    "hub: convert": _command(*_FROM_HUB, hub=mini),
    "hub: convert --low-disk": _command(*_FROM_HUB, "--low-disk", hub=mini),
    "hub: a GGUF": _command("verify", f"{NAME}:Q8_0", "--quick", hub=_one_file),
    "hub: a split GGUF": _command("verify", f"{NAME}:Q4_K_M", "--quick", hub=_one_file),
    "calibrate": _command(*_CALIBRATE, prepare=_link(micro, text)),
    "calibrate --refine": _command(*_CALIBRATE, "--refine", prepare=_link(micro, text)),
    "export": _command(
        "export", "mini.gguf", "-o", "out", "--shard-size", "2MB", prepare=_link(mini_q8),
        whole=("out",),
    ),
    "logits": _command(
        "perplexity", "q8.gguf", "-f", "text.txt", "-c", "128", "--save-logits", "base.kld",
        prepare=_link(q8, text),
    ),
    "verify --fix": _command(
        "verify", "wrong-mini.gguf", "--quick", "--fix", "fixed.gguf",
        prepare=_link(lambda: wrong(mini_q8())),
    ),
    "verify --fix, split": _command(
        "verify", "split-00001-of-00004.gguf", "--quick", "--fix", "fixed.gguf",
        prepare=_wrong_shards,
    ),
}  # fmt: skip


_COUNTS = {
    "convert": 50, "convert, one thread": 20, "convert --split-max-size": 40, "convert --force": 40,
    "hub: convert": 40, "hub: convert --low-disk": 40, "hub: a GGUF": 40, "hub: a split GGUF": 40,
    "calibrate": 100, "export": 100, "logits": 100, "verify --fix": 60, "verify --fix, split": 40,
}  # fmt: skip

PART = Part(
    "resumed or redone to the same bytes; nothing else on disk",
    {name: (_trial(name), _COUNTS.get(name, 20)) for name in _CASES} | CHAT_TRIALS,
)
