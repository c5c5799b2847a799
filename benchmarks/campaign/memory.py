"""Less memory than a command plans for, by the limit of its address space or of its cgroup.

The command says one sentence or makes do. Linux may kill what goes over the limit of a cgroup; what
is on the disk must then be good for the next run.
"""

import signal
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
from benchmarks.campaign.limits import CGROUPS, Limits
from benchmarks.campaign.processes import Place
from benchmarks.campaign.trial import Part, Trial

__all__ = ["PART"]


def _trial(name: str) -> Trial:
    def try_once(random: Random, folder: Path) -> None:
        grown = undisturbed(name)[1].grown
        place = Place(folder)
        prepare(name, place)
        if random.random() < 0.25 and CGROUPS.is_dir():
            size = int(2 ** random.uniform(23, 28))
            what, limits = f"a cgroup of {size} bytes", Limits(cgroup=size)
        else:
            size = int(random.uniform(0.01, 1) * grown)
            what, limits = f"{size} of {grown} bytes of addresses", Limits(address_space=size)
        outcome = run(name, place, Disturbance(limits=limits))
        if not (limits.cgroup and outcome.code == -signal.SIGKILL):
            check(name, place, outcome, what)
        check_again(name, place, what)

    return try_once


PART = Part(
    "one sentence, or success with less memory; inputs untouched; the same command afterwards "
    "comes to the same bytes",
    {name: (_trial(name), 12) for name in CASES if name != "inspect"},
)
