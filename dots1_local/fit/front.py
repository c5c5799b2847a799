"""The files that a machine can trade speed for quality with, and the knee among them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dots1_local.devices.hardware import Hardware
from dots1_local.errors import UsageError
from dots1_local.fit.costs import Turn
from dots1_local.fit.search import MachineFile, Search
from dots1_local.fit.target import Target
from dots1_local.sizes import human_bytes

__all__ = ["Fit", "fit", "knee_rank"]

_UNNOTICED = 0.005  # nats a token


@dataclass(frozen=True)
class Fit:
    """The `chosen` file for a machine, and the `front` that it was chosen from (else only itself).

    No file of the front is better than another in both KL divergence and the turn's time.
    """

    machine: str
    turn: Turn
    front: tuple[MachineFile, ...]
    chosen: MachineFile

    def to_json(self) -> dict[str, Any]:
        """Plain values, for scripts: the front, and which file of it was chosen."""
        return {
            "machine": self.machine,
            "prompt": self.turn.prompt,
            "answer": self.turn.answer,
            "chosen": self.front.index(self.chosen),
            "front": [_as_json(each, self.turn) for each in self.front],
        }


def knee_rank(file: MachineFile) -> float:
    """What is least at the knee of a front: from there, a percent of one costs more of the other.

    A KL divergence far below what stock Q5_K_M leaves (0.004 on the examples) counts for little.
    """
    return (file.kl + _UNNOTICED) * file.turn


def _as_json(file: MachineFile, turn: Turn) -> dict[str, Any]:
    return {
        "bytes": file.nbytes,
        "kl": file.kl,
        "seconds": file.turn,
        "decode": 1 / file.decode,
        "prefill": turn.prefill(file.turn, file.decode),
        "speeds": [asdict(each) for each in file.speeds],
        "types": dict(file.plan.types),
        "expert_width": file.plan.expert_width,
        "placement": file.placement.to_json(),
    }


def fit(
    search: Search,
    *,
    nbytes: float | None = None,
    tok_s: float | None = None,
    kl: float | None = None,
) -> Fit:
    """The file for the machine of a search, of at most `nbytes` of tensors if given.

    With `tok_s` it has the least KL divergence that decodes at that speed in the middle of the
    turn's answer; with `kl` it has the fastest turn that keeps this KL divergence; else it is the
    knee of the front.

    Raises:
        UsageError: no file reaches the target; the message says what is possible.
    """
    if tok_s is not None:
        found = search.best(Target(nbytes, decode=1 / tok_s, kl=kl))
    elif kl is not None:
        found = search.best(Target(nbytes, kl=kl))
    else:
        front = search.front(nbytes)
        found = min(front, key=knee_rank, default=None)
        if found is not None:
            return Fit(search.machine.name, search.turn, tuple(front), found)
    if found is None:
        raise UsageError(_out_of_reach(search, nbytes, tok_s, kl))
    return Fit(search.machine.name, search.turn, (found,), found)


def _out_of_reach(
    search: Search, nbytes: float | None, tok_s: float | None, kl: float | None
) -> str:
    """Say what the machine can do at best."""
    machine = search.machine
    best = search.best(Target(nbytes))
    if best is None:
        limit = "" if nbytes is None else f" of at most {human_bytes(nbytes)}"
        return f"{machine.name} has no room for any file{limit} of this model; {_room(machine)}"
    if kl is not None and best.kl > kl:
        return (
            f"no file that fits {machine.name} has a KL divergence of {kl:g} or less: the best "
            f"is predicted to have {1.005 * best.kl:.3g}"
        )
    fastest = search.fastest(nbytes)
    rest = "" if kl is None else f" with a KL divergence of at most {kl:g}"
    return (
        f"no file decodes at {tok_s:g} tok/s on {machine.name}{rest}: the fastest is predicted to "
        f"reach {0.995 / fastest.decode:.3g}, with a KL divergence of {fastest.kl:.3g}"
    )


def _room(machine: Hardware) -> str:
    devices: Sequence[str] = [
        f"{each.name} {human_bytes(each.free)}" for each in (*machine.devices, machine.cpu)
    ]
    return f"free are {', '.join(devices)}"
