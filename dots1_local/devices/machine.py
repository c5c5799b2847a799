"""The devices that the engine finds, and their speeds, asked for in a process of its own.

    python -m dots1_local.runtime.devices.detect '{"workers": [], "measure": "CPU", "threads": 2}'

answers with a machine's description and, in it, the speed of the device to be measured.

This machine as it is: its devices and memory now, their speeds measured once and kept.

Others are described in files, some of which come with this package.
"""

import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from dots1_local.devices import child
from dots1_local.devices.backends import DeviceInfo, add_worker, backend_names, build_with, devices
from dots1_local.devices.hardware import (
    CPU,
    Device,
    Hardware,
    hardware_from,
    load_hardware,
    physical_cores,
)
from dots1_local.devices.limits import available_ram, read_rate
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.json_file import Fields
from dots1_local.files.partial_file import write_whole
from dots1_local.progress import Progress, silent

__all__ = [
    "Measure",
    "detect",
    "find_hardware",
    "hardware_names",
    "lacking",
    "this_machine",
]


_PATIENCE = 60.0  # seconds without a word
_HEAD = ("format", "version")


def detect(request: Mapping[str, Any], progress: Progress = silent) -> Hardware:
    """The devices of the engine and of the `workers`; one with speed if there is one to `measure`.

    Cores and the RAM that may be used are for the caller to say.

    Raises:
        Dots1Error: the engine died, hung, made no sense or could not do it.
    """
    target = request.get("measure")
    doing = f"measuring {target}" if target else "looking for devices"
    answer = child.ask(__name__, request, doing, progress, patience=_PATIENCE)
    try:
        return hardware_from(Fields(answer, "the answer"), "the answer")
    except UsageError as error:
        raise Dots1Error(f"the engine's answer made no sense while {doing}: {error}") from None


def _detected(request: Mapping[str, Any]) -> dict[str, Any]:
    """The child's part."""
    for endpoint in request["workers"]:
        add_worker(endpoint)
    found = _look()
    if name := request.get("measure"):
        found = _with_speed(found, name, request["threads"])
    return {key: value for key, value in found.to_json().items() if key not in _HEAD}


def _look() -> Hardware:
    everything = devices()
    cpu = next((each for each in everything if each.kind == "cpu"), None)
    if cpu is None:
        raise Dots1Error("this llama-cpp-python has no CPU backend; install another build")
    built = f"llama-cpp-python {version('llama-cpp-python')} ({', '.join(backend_names())})"
    others = tuple(_device(each) for each in everything if each.kind in ("gpu", "igpu"))
    return Hardware("this machine", "the engine", built, 1, replace(_device(cpu), name=CPU), others)


def _device(info: DeviceInfo) -> Device:
    worker = info.description if info.backend == "RPC" else None
    description = " ".join("".join(filter(str.isprintable, info.description)).split())
    free = min(info.free, info.total)
    return Device(info.name, info.backend, description, free, info.total, None, worker)


def _with_speed(found: Hardware, name: str, threads: int) -> Hardware:
    from dots1_local.devices.speed import measure_speed

    info = next(each for each in devices() if each.name == name)
    speed = measure_speed(info, threads, child.report_progress)
    if name == CPU:
        return replace(found, cpu=replace(found.cpu, speed=speed))
    return replace(
        found,
        devices=tuple(
            replace(each, speed=speed) if each.name == name else each for each in found.devices
        ),
    )


if __name__ == "__main__":
    try:
        child.answer(_detected(json.loads(sys.argv[1])))
    except Dots1Error as error:
        child.answer(error)


Measure = Literal["cached", "again"] | bool

_MACHINES = Path(__file__).parent / "machines"
_ROOT = Path("/")


def this_machine(
    workers: Sequence[str] = (), *, measure: Measure = True, progress: Progress = silent
) -> Hardware:
    """This machine, with the devices of `workers` (host:port).

    Memory is what is free now. Speeds are measured, in a minute, where they never were; with
    "cached" those stay unknown, with "again" all are measured, with False none is said.

    Raises:
        UsageError: a worker's address is none.
        Dots1Error: a worker does not answer, or the engine died or hung.
    """
    from dots1_local.devices.rpc import parse_endpoint, probe_all

    endpoints = list(dict.fromkeys(map(parse_endpoint, workers)))
    probe_all(endpoints)
    found = _present(detect({"workers": endpoints}))
    if measure is False:
        return found
    path = _cache_path(found)
    cached = _load(path)
    known = _with_known(found, cached) if cached and measure != "again" else found
    if measure == "cached":
        return known
    return _measured(known, cached, endpoints, path, progress)


def find_hardware(text: str) -> Hardware:
    """The machine described in a file, or by one of the descriptions that come with this package.

    Raises:
        UsageError: neither; the message lists the names there are.
    """
    if text in hardware_names():
        return load_hardware(_MACHINES / f"{text}.json")
    if not Path(text).exists():
        raise UsageError(
            f"{text} is no description of a machine; give a file or one of "
            f"{', '.join(hardware_names())}"
        )
    return load_hardware(text)


def hardware_names() -> tuple[str, ...]:
    """The names of the descriptions that come with this package."""
    return tuple(sorted(path.stem for path in _MACHINES.glob("*.json")))


def lacking(hardware: Hardware, root: Path = _ROOT) -> tuple[str, ...]:
    """What this machine has or could use and its engine was built without, and how to get it."""
    built = hardware.engine.partition("(")[2].rstrip(")").split(", ")
    sentences = []
    for backend, flag, owner, present in _GPUS:
        if backend in built or "Vulkan" in built or not present(root):
            continue
        sentences.append(
            f"there is an {owner} GPU's driver, but this llama-cpp-python was built without "
            f"{backend}; to use the GPU: {build_with(flag, 'GGML_RPC')}"
        )
    if "RPC" not in built:
        sentences.append(
            "this llama-cpp-python was built without RPC, which --worker needs; to get it: "
            f"{build_with('GGML_RPC')}"
        )
    return tuple(sentences)


def _has_nvidia(root: Path) -> bool:
    return (root / "proc/driver/nvidia/version").exists() or bool(shutil.which("nvidia-smi"))


def _has_amd(root: Path) -> bool:
    return (root / "dev/kfd").exists()


_GPUS = (
    ("CUDA", "GGML_CUDA", "NVIDIA", _has_nvidia),
    ("ROCm", "GGML_HIP", "AMD", _has_amd),
)


def _present(found: Hardware) -> Hardware:
    """With what only this process knows: its share of RAM and cores."""
    ram = available_ram()
    cpu = found.cpu if ram is None else replace(found.cpu, free=ram.available, total=ram.total)
    name = "".join(filter(str.isprintable, platform.node())) or "this machine"
    return replace(found, name=name, source="measured here", cores=physical_cores(), cpu=cpu)


def _measured(
    known: Hardware,
    cached: Hardware | None,
    workers: Sequence[str],
    path: Path,
    progress: Progress,
) -> Hardware:
    """With every speed that is missing, which are kept."""
    everything = {device.name: device for device in (known.cpu, *known.devices)}
    missing = [name for name, device in everything.items() if device.speed is None]
    for name in missing:
        request = {"workers": list(workers), "measure": name, "threads": known.cores}
        speed = detect(request, progress).device(name).speed
        everything[name] = replace(everything[name], speed=speed)
    disk = read_rate(_folder()) if CPU in missing else known.disk
    cpu, *devices = everything.values()
    hardware = replace(known, cpu=cpu, devices=tuple(devices), disk=disk)
    if missing:
        _save(path, hardware, cached)
    return hardware


def _with_known(found: Hardware, cached: Hardware) -> Hardware:
    """With the speeds of those devices that are the ones measured before."""
    before = {_identity(device): device.speed for device in cached.devices}
    devices = tuple(replace(each, speed=before.get(_identity(each))) for each in found.devices)
    if (found.cpu.description, found.cores) != (cached.cpu.description, cached.cores):
        return replace(found, devices=devices)
    cpu = replace(found.cpu, speed=cached.cpu.speed)
    return replace(found, cpu=cpu, devices=devices, disk=cached.disk)


def _identity(device: Device) -> tuple[object, ...]:
    return device.name, device.description, device.total, device.worker


def _folder() -> Path:
    """Where measurements are kept, made if it can be; of a relative path the standard says no."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (base if base.is_absolute() else Path.home() / ".cache") / "dots1"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir())
    return folder


def _cache_path(found: Hardware) -> Path:
    key = sha256(f"{found.name} {found.engine}".encode()).hexdigest()[:16]
    return _folder() / f"hardware-{key}.json"


def _load(path: Path) -> Hardware | None:
    """What was measured before; what cannot be read is measured again."""
    try:
        return load_hardware(path)
    except UsageError:
        return None


def _save(path: Path, hardware: Hardware, before: Hardware | None) -> None:
    """Keep the speeds, with those of devices that are not here this time."""
    names = {device.name for device in hardware.devices}
    absent = [each for each in (before.devices if before else ()) if each.name not in names]
    kept = replace(hardware, devices=(*hardware.devices, *absent))
    text = json.dumps(kept.to_json(), indent=1) + "\n"
    with suppress(OSError):  # the figures are good, and next time measured again
        write_whole(path, text.encode())
