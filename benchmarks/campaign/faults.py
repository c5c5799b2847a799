"""Disks that are full or fail, folders that may not be written, inputs that go, clocks that jump.

One fault strikes each run. The command then says one sentence that names its cause, or succeeds as
if nothing was; and the same command without the fault comes to the bytes of a run that nobody
disturbed.
"""

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from benchmarks.campaign.disturbed import (
    Disturbance,
    check,
    check_again,
    prepare,
    run,
    undisturbed,
)
from benchmarks.campaign.disturbed_cases import CASES
from benchmarks.campaign.limits import Limits
from benchmarks.campaign.processes import Place, faults
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
# What a sentence says of an error, where that may be something else than the system's text.
_CAUSES = {
    errno.ENOSPC: "[Nn]o space|full|free", errno.EDQUOT: "[Qq]uota|full|free",
    errno.ENOMEM: "memory", errno.EFBIG: "too large", errno.EIO: "[Ii]nput/output|I/O",
}  # fmt: skip
_ATTEMPTS = 20  # at a fault that strikes
_OPTIONAL = ("chat_template.jinja", "generation_config.json", "special_tokens_map.json",
             "tokenizer_config.json")  # fmt: skip


def _trial(name: str) -> Trial:
    def try_once(random: Random, folder: Path) -> None:
        fault = random.choice([_operation, _operation, _operation, _operation, _small_disk,
                               _small_file, _stdout, _read_only, _input_goes, _clock])  # fmt: skip
        undisturbed(name)
        for attempt in range(_ATTEMPTS):
            place = Place(folder / str(attempt))
            prepare(name, place)
            if fault(random, name, place):
                return
            shutil.rmtree(place.folder)
        raise Broken(f"no fault of {_ATTEMPTS} struck")

    return try_once


def _operation(random: Random, name: str, place: Place) -> bool:
    """Let an operation fail; False if there was none of this number."""
    operation = random.choice(list(_OPERATIONS))
    error = random.choice(_OPERATIONS[operation])
    below = random.choice(["work", "work", "inputs", "inputs", "home", "temporary"])
    at = int(2 ** random.uniform(0, 6)) - 1
    stays = error == errno.ENOSPC or random.random() < 0.3
    if error == errno.EINTR or operation == "short":
        stays = False
    code = errno.errorcode.get(error, "")
    disturbance = _variables(place, {
        "FAULT_OPERATION": operation, "FAULT_BELOW": str(place.folder / below),
        "FAULT_AT": str(at), "FAULT_STAYS": str(int(stays)), "FAULT_ERROR": str(error),
    })  # fmt: skip
    outcome = run(name, place, disturbance)
    hits = _hits(place)
    at_files = sorted({os.path.relpath(hit, place.folder) for hit in hits})
    what = f"{operation} {at}{' and later' * stays} of {', '.join(at_files[:3])}: {code}"
    check(name, place, outcome, what, cause=_CAUSES.get(error, os.strerror(error) if error else ""))
    check_again(name, place, what)
    return bool(hits)


def _variables(place: Place, variables: dict[str, str]) -> Disturbance:
    given = {"LD_PRELOAD": str(faults()), "FAULT_HITS": str(place.folder / "hits")}
    return Disturbance(given | variables)


def _hits(place: Place) -> list[str]:
    """The paths of operations that failed."""
    file = place.folder / "hits"
    return file.read_text(errors="replace").splitlines() if file.exists() else []


def _small_disk(random: Random, name: str, place: Place) -> bool:
    top = random.choice(["work", "work", "home", "temporary"])
    size = int(2 ** random.uniform(12, 25))
    what = f"a disk of {size} bytes as {top}"
    earlier = place.folder / "earlier"
    shutil.copytree(place.folder / top, earlier)
    with _mounted(place.folder / top, "-t", "tmpfs", "-o", "size=256m", "tmpfs"):
        shutil.copytree(earlier, place.folder / top, dirs_exist_ok=True)
        used = sum(path.stat().st_size for path in earlier.rglob("*") if path.is_file())
        _remount(place.folder / top, f"size={size + used}")
        check(name, place, run(name, place), what, cause="space|full|free")
        _remount(place.folder / top, "size=256m")
        check_again(name, place, what)
    return True


def _small_file(random: Random, name: str, place: Place) -> bool:
    size = int(2 ** random.uniform(8, 25))
    what = f"files of at most {size} bytes"
    outcome = run(name, place, Disturbance(limits=Limits(file_size=size)))
    check(name, place, outcome, what, cause="too large|large|limit")
    check_again(name, place, what)
    return True


def _stdout(random: Random, name: str, place: Place) -> bool:
    stdout = random.choice(["/dev/full", "closed"])
    what = f"stdout is {stdout}"
    check(name, place, run(name, place, Disturbance(stdout=stdout)), what)
    check_again(name, place, what)
    return True


def _read_only(random: Random, name: str, place: Place) -> bool:
    top = random.choice(["work", "home", "temporary"])
    with _mounted(place.folder / top, "--bind", str(place.folder / top)):
        _remount(place.folder / top, "bind,ro")
        check(name, place, run(name, place), f"{top} is read-only", cause="[Rr]ead-only")
    check_again(name, place, f"{top} was read-only")
    return True


def _input_goes(random: Random, name: str, place: Place) -> bool:
    files = sorted(path for path in (place.folder / "inputs").rglob("*") if path.is_file())
    if not files:
        return _clock(random, name, place)
    file, share = random.choice(files), random.random()
    optional = file.name in _OPTIONAL  # a run that starts without it makes something else
    action = "is cut" if optional else random.choice(["is removed", "is cut"])
    after = random.uniform(0, undisturbed(name)[1].seconds)
    kept = shutil.copy(file, place.folder / "kept")

    def during() -> None:
        time.sleep(after)
        if action == "is cut":
            with file.open("r+b") as content:
                content.truncate(int(share * file.stat().st_size))
        else:
            file.unlink()

    what = f"{file.name} {action} after {after:.2f} s"
    touched = [file.relative_to(place.folder).as_posix()]
    outcome = run(name, place, Disturbance(during=during))
    # A process that reads what is cut from a file it has mapped is killed, as llama.cpp is.
    if not (action == "is cut" and outcome.code == -signal.SIGBUS):
        check(name, place, outcome, what, touched=touched)
    shutil.copy(kept, file)
    check_again(name, place, what)
    return True


def _clock(random: Random, name: str, place: Place) -> bool:
    seconds = random.choice([-1, 1]) * random.choice([60, 3600, 7 * 3600, 90 * 86400])
    at = int(2 ** random.uniform(0, 9)) - 1
    disturbance = _variables(place, {"FAULT_CLOCK": str(seconds), "FAULT_CLOCK_AT": str(at)})
    what = f"the clock jumps by {seconds} s at reading {at}"
    outcome = run(name, place, disturbance)
    check(name, place, outcome, what)
    if outcome.code:
        raise Broken(f"{what}: {outcome.code}, {outcome.stderr[-300:]}")
    check_again(name, place, what)
    return True


@contextmanager
def _mounted(folder: Path, *how: str) -> Iterator[None]:
    subprocess.run(["mount", *how, folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def _remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


PART = Part(
    "success only with the whole output; else one sentence with its cause; inputs and earlier "
    "files untouched; the same command afterwards comes to the same bytes and leaves nothing else",
    {name: (_trial(name), 20) for name in CASES},
)
