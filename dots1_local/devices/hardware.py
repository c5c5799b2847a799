"""The devices of a machine, their memory, and how fast they are.

These are plain data that round-trip through a small JSON file, so that a person can describe a
machine that they do not have, and plan for it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from dots1_local.errors import UsageError
from dots1_local.files.json_file import JsonError, convert_json, read_json

__all__ = [
    "CPU", "LONG_ROW", "SHORT_ROW", "Device", "Hardware", "Rate", "Speed", "hardware_from_json",
    "load_hardware",
]  # fmt: skip

LONG_ROW, SHORT_ROW = 4096, 1408  # weights of the rows that are measured
CPU = "CPU"  # llama.cpp's name of the device that RAM belongs to

_FORMAT, _VERSION = "dots1-hardware", 1
_NAME = "description of a machine"

_Text = Annotated[str, Meta(max_length=1 << 12, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]  # one line
_Bytes = Annotated[int, Meta(ge=0, le=1 << 53)]
_Positive = Annotated[float, Meta(gt=0)]
_Cost = Annotated[float, Meta(ge=0)]


@dataclass(frozen=True)
class Rate:
    """Multiply-adds a second of a device on one type.

    `decode` is for a single token. `prefill` is for a matrix times dozens of tokens, as in a routed
    expert, and `dense` for a matrix times hundreds, as everywhere else (None: as `prefill`).
    `short` is as `decode`, whose rows have 4,096 weights, but for rows of 1,408, as in an expert's
    down projection (None: as `decode`). A measured `decode` reads its weights from memory, so it
    includes whatever limits that.
    """

    decode: _Positive
    prefill: _Positive
    dense: _Positive | None = None
    short: _Positive | None = None

    def decode_of(self, columns: int) -> float:
        """The rate of decoding with rows of so many weights; each row takes some time besides."""
        if self.short is None:
            return self.decode
        length = min(max(columns, SHORT_ROW), LONG_ROW)
        share = (1 / length - 1 / LONG_ROW) / (1 / SHORT_ROW - 1 / LONG_ROW)
        return 1 / ((1 - share) / self.decode + share / self.short)


@dataclass(frozen=True)
class Speed:
    """How fast a device is, in bytes and seconds.

    `bandwidth` is the bytes a second that matrix products read from the device's memory; a product
    takes max(bytes / bandwidth, multiply-adds / rate). `matmul` is by quant type. `attention` is by
    KV type and counts the multiply-adds of flash attention, masked ones included. A type that is
    missing is one that the device cannot compute. `repacked` replaces `matmul` for weights in a CPU
    buffer that llama.cpp rearranges, for the types that it rearranges. A graph node costs `node`
    seconds more than its arithmetic. A split, which hands work to this device and its result back,
    costs `split` seconds. `upload` is the bytes a second from pinned host memory, `upload_pageable`
    from other host memory; both are 0 for the CPU.
    """

    bandwidth: _Positive
    matmul: Mapping[str, Rate]
    attention: Mapping[str, Rate]
    node: _Cost
    split: _Cost
    upload: _Cost = 0.0
    upload_pageable: _Cost = 0.0
    repacked: Mapping[str, Rate] = field(default_factory=dict)


@dataclass(frozen=True)
class Device:
    """A device of the engine: bytes of its memory, `free` now and in total; `speed` if known.

    `backend` is the engine's name for its kind: CPU, CUDA, ROCm, Vulkan, Metal, RPC. `worker` is
    the host:port of the worker that has the device.
    """

    name: _Text
    backend: _Text
    description: _Text
    free: _Bytes
    total: _Bytes
    speed: Speed | None = None
    worker: _Text | None = None


@dataclass(frozen=True)
class Hardware:
    """A machine: its CPU with the RAM, and its other devices in the engine's order.

    `disk` is the bytes a second that weights can be read at, None if not measured. `engine` is the
    build of llama.cpp that was measured, and `source` says where the figures come from.
    """

    name: _Text
    source: _Text
    engine: _Text
    cores: Annotated[int, Meta(ge=1, le=1 << 16)]
    cpu: Device
    devices: tuple[Device, ...] = ()
    disk: _Positive | None = None

    def device(self, name: str) -> Device:
        """The device with this name; the CPU is one.

        Raises:
            UsageError: there is none; the message lists the devices.
        """
        by_name = {device.name: device for device in (*self.devices, self.cpu)}
        if name not in by_name:
            raise UsageError(f"{self.name} has no device {name}; it has {', '.join(by_name)}")
        return by_name[name]

    def to_json(self) -> dict[str, Any]:
        """The content of a file that `load_hardware` reads."""
        content = msgspec.to_builtins(self)
        return {"format": _FORMAT, "version": _VERSION, **content}


def load_hardware(path: str | Path) -> Hardware:
    """Read a machine's description, as `dots1 hardware --json` prints it.

    Raises:
        UsageError: the file is unreadable or not a description, or a figure makes no sense.
    """
    return hardware_from_json(read_json(path, _NAME), str(path))


def hardware_from_json(raw: Any, what: str) -> Hardware:
    """Convert what `Hardware.to_json` returned; `what` names the file in errors.

    Raises:
        UsageError: `raw` is not a description of a machine, or a figure makes no sense.
    """
    if not isinstance(raw, dict) or raw.get("format") != _FORMAT:
        raise UsageError(f"{what} is not a {_NAME}, which dots1 hardware --json prints")
    if raw.get("version") != _VERSION:
        raise UsageError(f"{what} is a {_NAME} from another version of dots1-local; make it again")
    content = {key: value for key, value in raw.items() if key not in ("format", "version")}
    try:
        hardware = convert_json(content, Hardware)
        _check(hardware, content)
    except JsonError as error:
        raise UsageError(f"{what}: {error}") from None
    return hardware


def _check(hardware: Hardware, content: Any) -> None:
    if unknown := set(_paths(content)) - set(_paths(hardware.to_json())):
        raise JsonError("unknown field", min(unknown))
    names = [hardware.cpu.name, *(device.name for device in hardware.devices)]
    if hardware.cpu.name != CPU:
        raise JsonError(f"expected {CPU!r}, got {hardware.cpu.name!r}", "cpu.name")
    if len(set(names)) < len(names):
        raise JsonError(f"two devices have the same name: {', '.join(names)}", "devices")
    places = {"cpu": hardware.cpu} | {f"devices[{n}]": d for n, d in enumerate(hardware.devices)}
    for place, device in places.items():
        if device.free > device.total:
            raise JsonError(
                f"{device.free} of {device.total} bytes cannot be free", f"{place}.free"
            )
        for name in ("upload", "upload_pageable") if device.name != CPU else ():
            if device.speed and not getattr(device.speed, name):
                raise JsonError("expected float > 0.0", f"{place}.speed.{name}")


def _paths(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all fields of a JSON value, such as "devices[0].name"."""
    items = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list | tuple) else items:
        where = f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}".lstrip(".")
        yield where
        yield from _paths(item, where)
