"""What llama.cpp logs: errors, and the sizes of the buffers that it allocates on each device.

All of it goes to Python's logger `dots1_local.engine`, and nothing to the terminal unless that
logger does. The errors go into our own messages; the sizes are added up by device and compared with
what was predicted.
"""

import logging
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llama_cpp import llama_cpp as llama

from dots1_local.devices.hardware import CPU
from dots1_local.placement.footprint import Usage
from dots1_local.sizes import human_bytes

__all__ = [
    "Allocated", "Difference", "Log", "Report", "capture", "compare", "device_of",
    "memory_warnings", "read_report", "recent_errors",
]  # fmt: skip

_ERROR = 4  # GGML_LOG_LEVEL_ERROR; the binding's own table is of an older llama.cpp
_LEVELS = {2: logging.INFO, 3: logging.WARNING, _ERROR: logging.ERROR}  # others are for debugging
_MIB = 1 << 20
_TOLERANCE = 300 * _MIB, 0.02  # what a prediction may be off by, in bytes or as a share of it
_SIZE = re.compile(r"(\S+) +(model|KV|output|compute) buffer size = +(\d+\.\d+) MiB")
_CLASSES = {"model": "weights", "KV": "kv", "output": "compute", "compute": "compute"}
_logger = logging.getLogger("dots1_local.engine")
_logger.addHandler(logging.NullHandler())  # without any, Python would print warnings
_errors: deque[str] = deque(maxlen=64)
_sizes: deque[str] = deque(maxlen=1024)


@dataclass
class Log:
    """Lines that llama.cpp logged: its errors, and the `sizes` of buffers."""

    errors: Sequence[str] = ()
    sizes: Sequence[str] = ()

    def cause(self) -> str:
        """The first error, which the later ones only repeat in other words."""
        return self.errors[0] if self.errors else "it did not say why"


@contextmanager
def capture() -> Iterator[Log]:
    """Collect what calls into llama.cpp log; the lines are there when the block ends."""
    # Each time, because others who use llama.cpp in this process may have set a callback.
    llama.llama_log_set(_keep, None)
    log = Log()
    _errors.clear()
    _sizes.clear()
    try:
        yield log
    finally:
        log.errors, log.sizes = list(_errors), list(_sizes)


def recent_errors() -> list[str]:
    """The latest errors, the newest last: for a call that never returns."""
    return list(_errors)


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _keep(level: int, text: bytes, _: Any) -> None:
    line = text.decode("utf-8", errors="replace").strip()
    if not line.strip("."):  # progress, a dot at a time
        return
    _logger.log(_LEVELS.get(level, logging.DEBUG), "%s", line)
    if level == _ERROR or " buffer size = " in line:
        kept = _errors if level == _ERROR else _sizes
        kept.append(re.sub(r"^\w+: +", "", line))  # without the name of the C++ function


# Devices start before anything is captured; until now llama-cpp-python prints what they log.
llama.llama_log_set(_keep, None)


@dataclass(frozen=True)
class Allocated:
    """Bytes that the engine allocated on one device, by its log, which is exact to 5 kB."""

    weights: int = 0
    kv: int = 0
    compute: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute


Report = Mapping[str, Allocated]  # by device, the CPU first
_FIELDS = tuple(Allocated.__dataclass_fields__)


@dataclass(frozen=True)
class Difference:
    """Bytes of one class on one device, as predicted and as the engine allocated them."""

    device: str
    what: str
    predicted: int
    real: int


def read_report(lines: Iterable[str], devices: Mapping[str, str], weights: int) -> Report:
    """Add up what these lines of the log say by device.

    `devices` maps the names of buffers to the names of devices; all other buffers are in RAM:
    plain, pinned, repacked or mapped. `weights` is the bytes of all weights. A mapping spans the
    file from the first to the last tensor in RAM, including tensors between them that are
    elsewhere, so no more is counted than the weights that are not elsewhere.
    """
    sizes = {device: dict.fromkeys(_FIELDS, 0) for device in (CPU, *devices.values())}
    mapped = 0
    for match in filter(None, map(_SIZE.fullmatch, lines)):
        buffer, kind, mebibytes = match.groups()
        nbytes = round(float(mebibytes) * _MIB)
        if buffer == f"{CPU}_Mapped":
            mapped += nbytes
        else:
            sizes[device_of(buffer, devices)][_CLASSES[kind]] += nbytes
    elsewhere = sum(each["weights"] for each in sizes.values())
    sizes[CPU]["weights"] += min(mapped, max(weights - elsewhere, 0))
    return {device: Allocated(**each) for device, each in sizes.items()}


def device_of(buffer: str, devices: Mapping[str, str]) -> str:
    """The device of a buffer, given the devices by the names of their buffers; the CPU if none.

    The first device of every worker has buffers called RPC0[HOST:PORT], the buffers of MTL0 may be
    called MTL0_Mapped, and CUDA_Host is RAM.
    """
    return devices.get(buffer, devices.get(buffer.removesuffix("_Mapped"), CPU))


def compare(report: Report, predicted: Mapping[str, Usage]) -> tuple[Difference, ...]:
    """Prediction and outcome by device and class of memory, where either is more than 0 bytes."""
    found = []
    for device in dict.fromkeys((*report, *predicted)):
        usage, real = predicted.get(device, Usage()), report.get(device, Allocated())
        found += [Difference(device, n, getattr(usage, n), getattr(real, n)) for n in _FIELDS]
    return tuple(each for each in found if each.predicted or each.real)


def memory_warnings(report: Report, predicted: Mapping[str, Usage]) -> list[str]:
    """A sentence for each device on which the prediction was notably wrong.

    Scratch memory is left out, because the engine does not log it.
    """
    sentences = []
    for device, usage in predicted.items():
        expected, real = usage.total - usage.scratch, report.get(device, Allocated()).total
        if abs(real - expected) > max(_TOLERANCE[0], _TOLERANCE[1] * expected):
            sentences.append(
                f"the engine took {human_bytes(real)} of {device}, but {human_bytes(expected)} "
                "were predicted"
            )
    return sentences
