"""Files that were changed at random, given to the verbs that read them.

`mutant_kinds.py` has the files, `mutations.py` and `gguf_mutations.py` change them. A verb may take
what it was given or refuse it in a sentence; it may not show a traceback, crash, hang, take much
memory, or change a file.
"""

import os
import signal
from fnmatch import fnmatch
from pathlib import Path
from random import Random

from benchmarks.campaign.asking import answer_once
from benchmarks.campaign.inputs import TEXT
from benchmarks.campaign.mutant_kinds import KINDS, Kind
from benchmarks.campaign.processes import Place, Program
from benchmarks.campaign.trial import Broken, Part, Trial

__all__ = ["PART"]

_SECONDS = 10.0  # of the processor
_MEMORY = 2 << 30  # bytes that no file backs
_CODES = 0, 1, 2


def _trial(kind: Kind) -> Trial:
    def trial(random: Random, folder: Path) -> None:
        place = Place(folder)
        kind.prepare(place.work)
        victim = random.choice(sorted(place.work.glob(kind.pattern)))
        victim.write_bytes(kind.mutate(random, victim.read_bytes()))
        before = place.contents("work")
        command = random.choice(kind.commands)
        program = Program(place, command, limit=120)
        costs = _Costs(program.pid)
        if command[0] == "serve":
            answer_once(place, program, TEXT[:900])
        code = program.wait(costs.are_high)
        if costs.are_high():
            program.kill()
            raise Broken(f"{' '.join(command)}: {costs}")
        said = place.log.read_text(errors="replace")
        # A server that ends by itself when it is asked to end may die of that.
        if code == -signal.SIGTERM and command[0] == "serve":
            code = 0
        if code not in _CODES or "Traceback (most recent" in said or "GGML_ASSERT" in said:
            raise Broken(f"{' '.join(command)}: status {code}, {place.said()}")
        if code == 1 and "dots1: " not in said and command[0] != "verify":  # that one reports
            raise Broken(f"{' '.join(command)}: refused without a sentence, {place.said()}")
        after = place.contents("work")
        changed = [name for name, digest in before.items() if after.get(name) != digest]
        if code == 0:
            changed = [name for name in changed if not fnmatch(name, f"work/{kind.saved}")]
        if changed:
            raise Broken(f"{' '.join(command)}: {', '.join(changed)} changed")

    return trial


class _Costs:
    """The seconds and the memory of a process, as long as it lives."""

    def __init__(self, pid: int) -> None:
        self._pid, self._seconds, self._memory = pid, 0.0, 0

    def are_high(self) -> bool:
        try:
            fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
            status = Path(f"/proc/{self._pid}/status").read_text()
        except OSError:
            return self._high
        ticks = int(fields[11]) + int(fields[12])
        self._seconds = ticks / os.sysconf("SC_CLK_TCK")
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                self._memory = max(self._memory, int(line.split()[1]) << 10)
        return self._high

    @property
    def _high(self) -> bool:
        return self._seconds > _SECONDS or self._memory > _MEMORY

    def __str__(self) -> str:
        return f"{self._seconds:.1f} s of the processor and {self._memory / 1e6:.0f} MB"


PART = Part(
    "no traceback, no crash, at most 10 s and 2 GiB, no file changed",
    {name: (_trial(kind), count) for name, (kind, count) in KINDS.items()},
)
