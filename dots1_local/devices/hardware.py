"""What a machine has to run a model on: devices, their memory, and how fast they are.

Plain data that round-trips through a small JSON file, so that a machine one does not have can be
described, planned for, and argued about.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dots1_local.devices.limits import allowed_cpus, cpu_quota
from dots1_local.errors import UsageError
from dots1_local.files.json_file import Fields, read_document

__all__ = [
    "CPU",
    "Device",
    "Hardware",
    "Rate",
    "Speed",
    "hardware_from",
    "load_hardware",
    "physical_cores",
]

CPU = "CPU"  # llama.cpp's name of the device that RAM belongs to

_FORMAT, _VERSION = "dots1-hardware", 1
_COSTS, _UPLOADS = ("node", "split"), ("upload", "upload_pageable")
_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Rate:
    """Multiply-adds a second of a device on one type.

    `decode` is for one token, `prefill` where a matrix meets dozens of them at once as a routed
    expert does, `dense` where it meets hundreds as the others do (None: it is no different). Where
    it was measured, `decode` is of weights that come from memory: it contains whatever binds.
    """

    decode: float
    prefill: float
    dense: float | None = None


@dataclass(frozen=True)
class Speed:
    """How fast a device is, in bytes and seconds.

    `bandwidth` is what matrix products read from its memory: one takes
    max(bytes / bandwidth, multiply-adds / rate). `matmul` is by quant type, `attention` by KV type
    (multiply-adds of flash attention, masked ones included); what is missing there the device
    cannot do. `repacked` replaces `matmul` for weights in a CPU buffer that llama.cpp rearranges,
    for the types it does that to. A graph node costs `node` seconds more than its arithmetic, and a
    split, work handed to this device and its result handed back, `split` seconds. `upload` is what
    it takes from host memory that is pinned, `upload_pageable` from any other; both are 0 for the
    CPU.
    """

    bandwidth: float
    matmul: Mapping[str, Rate]
    attention: Mapping[str, Rate]
    node: float
    split: float
    upload: float = 0.0
    upload_pageable: float = 0.0
    repacked: Mapping[str, Rate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("matmul", "attention", "repacked"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))


@dataclass(frozen=True)
class Device:
    """A device of the engine: bytes of its memory, `free` now and in all; speed where known.

    `backend` is the engine's name for its kind: CPU, CUDA, ROCm, Vulkan, Metal, RPC. `worker` is
    the host:port of a device that another machine has.
    """

    name: str
    backend: str
    description: str
    free: int
    total: int
    speed: Speed | None = None
    worker: str | None = None


@dataclass(frozen=True)
class Hardware:
    """A machine: its CPU with the RAM, and the devices beside it in the engine's order.

    `disk` is bytes a second that weights can be read at, None where not measured. `engine` says
    which build of llama.cpp was measured, `source` where the figures come from.
    """

    name: str
    source: str
    engine: str
    cores: int
    cpu: Device
    devices: tuple[Device, ...] = ()
    disk: float | None = None

    def device(self, name: str) -> Device:
        """The device called `name`, the CPU included.

        Raises:
            UsageError: no such device; the message lists those there are.
        """
        everything = {device.name: device for device in (*self.devices, self.cpu)}
        if name not in everything:
            raise UsageError(f"{self.name} has no device {name}; it has {', '.join(everything)}")
        return everything[name]

    def to_json(self) -> dict[str, Any]:
        """What `load_hardware` reads."""
        return {"format": _FORMAT, "version": _VERSION, **_plain(self)}


def load_hardware(path: str | Path) -> Hardware:
    """Read a machine's description, as `dots1 hardware --json` prints it.

    Raises:
        UsageError: unreadable, no such file, or a figure that makes no sense.
    """
    raw = read_document(path, _FORMAT, "description of a machine", _VERSION)
    return hardware_from(raw, str(path))


def hardware_from(raw: Fields, what: str) -> Hardware:
    """The machine that a JSON object describes; `what` begins the sentence that is raised.

    Raises:
        UsageError: a figure makes no sense.
    """
    hardware = Hardware(
        name=raw.text("name"),
        source=raw.text("source"),
        engine=raw.text("engine"),
        cores=raw.integer("cores", 1, 1 << 16),
        cpu=_device(raw.group("cpu")),
        devices=tuple(_device(Fields(item, f"{what}, a device,")) for item in raw.items("devices")),
        disk=raw.number("disk") if raw.given("disk") else None,
    )
    raw.end()
    names = [hardware.cpu.name, *(device.name for device in hardware.devices)]
    if names[0] != CPU or len(set(names)) < len(names):
        raise UsageError(f"{what} must call the CPU {CPU!r} and no two devices the same")
    return hardware


def _device(raw: Fields) -> Device:
    device = Device(
        name=(name := raw.text("name")),
        backend=raw.text("backend"),
        description=raw.text("description"),
        free=raw.integer("free"),
        total=raw.integer("total"),
        speed=_speed(raw.group("speed"), is_cpu=name == CPU) if raw.given("speed") else None,
        worker=raw.text("worker") if raw.given("worker") else None,
    )
    raw.end()
    return device


def _speed(raw: Fields, *, is_cpu: bool) -> Speed:
    speed = Speed(
        bandwidth=raw.number("bandwidth"),
        matmul=_rates(raw.group("matmul")),
        attention=_rates(raw.group("attention")),
        repacked=_rates(raw.group("repacked")) if raw.given("repacked") else {},
        **{name: raw.number(name, zero=True) for name in _COSTS},
        **{name: raw.number(name, zero=is_cpu) for name in _UPLOADS},
    )
    raw.end()
    return speed


def _rates(raw: Fields) -> dict[str, Rate]:
    rates = {}
    for kind in raw.rest():
        rate = raw.group(kind)
        dense = rate.number("dense") if rate.given("dense") else None
        rates[kind] = Rate(rate.number("decode"), rate.number("prefill"), dense)
        rate.end()
    return rates


def _plain(value: Any) -> Any:
    """Of dataclasses and mappings dictionaries, of tuples lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once: they share what matrices need."""
    siblings = {_siblings(cpu) for cpu in allowed_cpus()}
    quota = cpu_quota()
    return len(siblings) if quota is None else max(1, min(len(siblings), int(quota)))


def _siblings(cpu: int) -> str:
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return str(cpu)
