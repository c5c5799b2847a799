"""What the engine really took of each device, by its own log, and how that differs from a plan."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dots1_local.devices.hardware import CPU
from dots1_local.placement.footprint import Usage
from dots1_local.sizes import human_bytes

__all__ = [
    "Difference",
    "Report",
    "Taken",
    "compare",
    "device_of",
    "read_report",
    "surprises",
]

_MIB = 1 << 20
_EXACT = 300 * _MIB, 0.02  # what a prediction may be wrong by, or by which part of it
_LINE = re.compile(r"(\S+) +(model|KV|output|compute) buffer size = +(\d+\.\d+) MiB")
_CLASSES = {"model": "weights", "KV": "kv", "output": "compute", "compute": "compute"}


@dataclass(frozen=True)
class Taken:
    """Bytes of one device, to the 5 kB that the engine's log is exact to."""

    weights: int = 0
    kv: int = 0
    compute: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute


Report = Mapping[str, Taken]  # by device, the CPU first


@dataclass(frozen=True)
class Difference:
    """Bytes of one class on one device, as predicted and as the engine took them."""

    device: str
    what: str
    predicted: int
    real: int


def read_report(lines: Iterable[str], devices: Mapping[str, str], weights: int) -> Report:
    """What each device was asked for in these lines of the log.

    `devices` are the engine's names of devices by those of their buffers. Memory of none of them
    is the CPU's: plain, pinned, repacked or mapped.
    A mapping spans the file from its first to its last tensor in RAM, with whatever of the
    `weights` bytes in all lies between and went elsewhere; only the rest of them is counted.
    """
    taken = {
        device: dict.fromkeys(Taken.__dataclass_fields__, 0) for device in (CPU, *devices.values())
    }
    mapped = 0
    for line in lines:
        if match := _LINE.fullmatch(line):
            buffer, kind, mebibytes = match.groups()
            size = round(float(mebibytes) * _MIB)
            if buffer == f"{CPU}_Mapped":
                mapped += size
            else:
                taken[device_of(buffer, devices)][_CLASSES[kind]] += size
    elsewhere = sum(sizes["weights"] for sizes in taken.values())
    taken[CPU]["weights"] += min(mapped, max(weights - elsewhere, 0))
    return {device: Taken(**sizes) for device, sizes in taken.items()}


def compare(report: Report, predicted: Mapping[str, Usage]) -> tuple[Difference, ...]:
    """Prediction and outcome of every class of memory that either has bytes of, by device."""
    found = (
        Difference(
            device,
            what,
            getattr(predicted.get(device, Usage()), what),
            getattr(report.get(device, Taken()), what),
        )
        for device in dict.fromkeys((*report, *predicted))
        for what in Taken.__dataclass_fields__
    )
    return tuple(each for each in found if each.predicted or each.real)


def surprises(report: Report, predicted: Mapping[str, Usage]) -> list[str]:
    """A sentence for each device of which the engine took notably more or less than predicted.

    Scratch space counts neither way: no log tells of it.
    """
    sentences = []
    for device, usage in predicted.items():
        expected, real = usage.total - usage.scratch, report.get(device, Taken()).total
        if abs(real - expected) > max(_EXACT[0], _EXACT[1] * expected):
            sentences.append(
                f"the engine took {human_bytes(real)} of {device}, where "
                f"{human_bytes(expected)} were predicted"
            )
    return sentences


def device_of(buffer: str, devices: Mapping[str, str]) -> str:
    """The device of the buffer called so, by the names of devices' buffers; else the CPU.

    Both of two workers have a buffer RPC0[HOST:PORT], MTL0's may be MTL0_Mapped; CUDA_Host is RAM.
    """
    return devices.get(buffer, devices.get(buffer.removesuffix("_Mapped"), CPU))
