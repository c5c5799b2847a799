"""Disks that are full or fail, folders that may not be written, inputs that go, clocks that jump.

One fault strikes each run. The command then says one sentence, or succeeds as if nothing was; and
the same command without the fault comes to the bytes of a run that nobody disturbed.
"""

import errno
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from benchmarks.campaign.disturbed import (
    CASES,
    Limits,
    Place,
    check,
    check_again,
    prepare,
    run,
    undisturbed,
)  # fmt: skip
from benchmarks.campaign.trial import Broken, Part, Trial

__all__ = ["PART"]

_OPERATIONS = {
    "open": (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EACCES, errno.ESTALE),
    "read": (errno.EIO, errno.EINTR, errno.ESTALE),
    "write": (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EINTR, errno.EFBIG),
    "short": (0,),
    "sync": (errno.EIO, errno.ENOSPC),
    "rename": (errno.EIO, errno.ENOSPC, errno.EACCES),
    "truncate": (errno.ENOSPC, errno.EIO),
    "mmap": (errno.ENOMEM, errno.ENODEV),
}
_OPTIONAL = ("chat_template.jinja", "generation_config.json", "special_tokens_map.json",
             "tokenizer_config.json")  # fmt: skip


def _trial(name: str) -> Trial:
    def try_once(random: Random, folder: Path) -> None:
        fault = random.choice([_operation, _operation, _operation, _small_disk, _stdout, _read_only,
                               _input_goes, _clock])  # fmt: skip
        undisturbed(name)
        place = Place(folder)
        prepare(name, place)
        fault(random, name, place)

    return try_once


def _operation(random: Random, name: str, place: Place) -> None:
    operation = random.choice(list(_OPERATIONS))
    error = random.choice(_OPERATIONS[operation])
    below = random.choice(["work", "work", "inputs", "home", "temporary"])
    at, stays = int(2 ** random.uniform(0, 7)) - 1, error == errno.ENOSPC or random.random() < 0.3
    if error == errno.EINTR or operation == "short":
        stays = False
    what = f"{operation} {at}{' and later' * stays} below {below}: {errno.errorcode.get(error, '')}"
    variables = {
        "FAULT_OPERATION": operation, "FAULT_BELOW": str(place.folder / below),
        "FAULT_AT": str(at), "FAULT_STAYS": str(int(stays)), "FAULT_ERROR": str(error),
    }  # fmt: skip
    _strike(name, place, Limits(variables), what)


def _small_disk(random: Random, name: str, place: Place) -> None:
    top = random.choice(["work", "work", "home", "temporary"])
    size = int(2 ** random.uniform(12, 25))
    with _mounted(place.folder / top, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        check(name, place, run(CASES[name], place), f"a disk of {size} bytes as {top}")
        subprocess.run(["mount", "-o", "remount,size=256m", place.folder / top], check=True)
        check_again(name, place, f"a disk of {size} bytes as {top}")


def _stdout(random: Random, name: str, place: Place) -> None:
    stdout = random.choice(["/dev/full", "closed"])
    _strike(name, place, Limits(stdout=stdout), f"stdout is {stdout}")


def _read_only(random: Random, name: str, place: Place) -> None:
    top = random.choice(["work", "home", "temporary"])
    with _mounted(place.folder / top, "--bind", place.folder / top):
        subprocess.run(["mount", "-o", "remount,bind,ro", place.folder / top], check=True)
        check(name, place, run(CASES[name], place), f"{top} is read-only")
    check_again(name, place, f"{top} was read-only")


def _input_goes(random: Random, name: str, place: Place) -> None:
    files = sorted(path for path in (place.folder / "inputs").rglob("*") if path.is_file())
    if not files:
        return _clock(random, name, place)
    file, share = random.choice(files), random.random()
    optional = file.name in _OPTIONAL  # a run that starts without it makes something else
    action = "is cut" if optional else random.choice(["is removed", "is cut"])
    after = random.uniform(0, undisturbed(name)[1].seconds)
    kept = file.with_name("kept")
    shutil.copy(file, kept)
    kept = kept.rename(place.folder / "kept")

    def during() -> None:
        time.sleep(after)
        if action == "is cut":
            with file.open("r+b") as content:
                content.truncate(int(share * file.stat().st_size))
        else:
            file.unlink()

    what = f"{file.name} {action} after {after:.2f} s"
    touched = [file.relative_to(place.folder).as_posix()]
    outcome = run(CASES[name], place, Limits(during=during))
    check(name, place, outcome, what, touched=touched)
    shutil.copy(kept, file)
    check_again(name, place, what)


def _clock(random: Random, name: str, place: Place) -> None:
    seconds = random.choice([-1, 1]) * random.choice([60, 3600, 7 * 3600, 90 * 86400])
    at = int(2 ** random.uniform(0, 9)) - 1
    limits = Limits({"FAULT_CLOCK": str(seconds), "FAULT_CLOCK_AT": str(at)})
    what = f"the clock jumps by {seconds} s at reading {at}"
    outcome = run(CASES[name], place, limits)
    check(name, place, outcome, what)
    if outcome.code:
        raise Broken(f"{what}: {outcome.code}, {outcome.stderr[-300:]}")
    check_again(name, place, what)


def _strike(name: str, place: Place, limits: Limits, what: str) -> None:
    check(name, place, run(CASES[name], place, limits), what)
    check_again(name, place, what)


@contextmanager
def _mounted(folder: Path, *how: object) -> Iterator[None]:
    subprocess.run(["mount", *map(str, how), str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


PART = Part(
    "success only with the whole output; else one sentence; inputs and earlier files untouched; "
    "the same command afterwards comes to the same bytes and leaves nothing else",
    {name: (_trial(name), 30) for name in CASES},
)
