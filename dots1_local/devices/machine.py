"""This machine: its devices and memory now, and their speeds, which are measured once and kept.

A child process asks the engine, because drivers start then and may hang or die:

    python -m dots1_local.devices.machine '{"workers": [], "measure": "CPU", "threads": 2}'

Other machines are described in files; some descriptions come with this package.
"""

import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from dots1_local.devices import child
from dots1_local.devices.backends import DeviceInfo, add_worker, backend_names, devices
from dots1_local.devices.hardware import CPU, Device, Hardware, hardware_from_json, load_hardware
from dots1_local.devices.limits import available_ram, physical_cores, read_rate
from dots1_local.devices.liveness import answering, end_if_silent
from dots1_local.devices.rpc import parse_endpoint, probe
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.user_folder import user_folder
from dots1_local.progress import Progress, silent

__all__ = ["detect", "find_hardware", "hardware_names", "started_machine", "this_machine"]

_MACHINES = Path(__file__).parent / "machines"
_MEASURED = 3  # raised when more is measured, so that kept speeds are measured again
# Seconds in which the child neither reports nor computes. It does not compute while a worker does.
_TIMEOUT, _WORKER_TIMEOUT = 60.0, 600.0


def this_machine(
    workers: Sequence[str] = (),
    *,
    measure: Literal["cached", "again"] | bool = True,
    progress: Progress = silent,
) -> Hardware:
    """This machine, with the devices of `workers` (host:port).

    Memory is what is free now. Speeds that were never measured are measured, which takes a minute.
    With "cached" they stay unknown, with "again" all are measured anew, with False all are unknown.

    Raises:
        UsageError: a worker's address is malformed.
        Dots1Error: a worker does not answer, or the engine died or hung.
    """
    endpoints = list(dict.fromkeys(map(parse_endpoint, workers)))
    probe(endpoints)
    found = _with_limits(detect({"workers": endpoints}))
    if measure is False:
        return found
    path, cached = _cache_path(found), _cached(found)
    known = _with_cached(found, cached) if cached and measure != "again" else found
    if measure == "cached":
        return known
    return _measured(known, cached, endpoints, path, progress)


def started_machine() -> Hardware:
    """This machine as this process's engine sees it, with the speeds that were measured before.

    The engine must have loaded a model, because drivers that start may hang or die, and must be
    computing nothing, because a worker answers one question at a time.
    """
    found = _with_limits(hardware_from_json(_answer({"workers": []}), "the engine's answer"))
    cached = _cached(found)
    return _with_cached(found, cached) if cached else found


def find_hardware(text: str) -> Hardware:
    """The machine that a file describes, or a description that comes with this package.

    Raises:
        UsageError: `text` is neither; the message lists the names.
    """
    if text in hardware_names():
        return load_hardware(_MACHINES / f"{text}.json")
    if not Path(text).exists():
        raise UsageError(
            f"{text} is not a description of a machine; give a file or one of "
            f"{', '.join(hardware_names())}"
        )
    return load_hardware(text)


def hardware_names() -> tuple[str, ...]:
    """The names of the descriptions that come with this package."""
    return tuple(sorted(path.stem for path in _MACHINES.glob("*.json")))


def detect(request: Mapping[str, Any], progress: Progress = silent) -> Hardware:
    """Ask a child process for the engine's devices, including those of the request's `workers`.

    The device that the request names as `measure`, if any, comes with its speed. The number of
    cores and the limits on RAM are not known to the child.

    Raises:
        Dots1Error: the engine died, hung, answered nonsense or reported an error.
    """
    target = request.get("measure")
    doing = f"measuring {target}" if target else "looking for devices"
    answer = child.ask(
        __name__,
        {**request, "answering": answering(request["workers"])},
        doing,
        progress,
        devices=(target,) if target and target != CPU else (),
        timeout=_WORKER_TIMEOUT if request["workers"] else _TIMEOUT,
    )
    try:
        return hardware_from_json(answer, "the answer")
    except UsageError as error:
        raise Dots1Error(f"the engine's answer made no sense while {doing}: {error}") from None


def _with_limits(found: Hardware) -> Hardware:
    """Add this machine's name, and the RAM and cores that this process may use."""
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
    """Measure all speeds that are missing, and keep each at once in the file at `path`."""
    for name in (CPU, *(device.name for device in known.devices)):
        if known.device(name).speed is not None:
            continue
        request = {"workers": list(workers), "measure": name, "threads": known.cores}
        measured = replace(known.device(name), speed=detect(request, progress).device(name).speed)
        if name == CPU:
            known = replace(known, cpu=measured, disk=read_rate(_folder()))
        else:
            devices = (measured if each.name == name else each for each in known.devices)
            known = replace(known, devices=tuple(devices))
        _save(path, known, cached)
    return known


def _cached(found: Hardware) -> Hardware | None:
    """What was measured before; a missing or damaged file is written again."""
    with suppress(UsageError):
        return load_hardware(_cache_path(found))
    return None


def _with_cached(found: Hardware, cached: Hardware) -> Hardware:
    """Add the speeds of devices that were measured before."""
    before = {_identity(device): device.speed for device in cached.devices}
    devices = tuple(replace(each, speed=before.get(_identity(each))) for each in found.devices)
    if (found.cpu.description, found.cores) != (cached.cpu.description, cached.cores):
        return replace(found, devices=devices)
    cpu = replace(found.cpu, speed=cached.cpu.speed)
    return replace(found, cpu=cpu, devices=devices, disk=cached.disk)


def _identity(device: Device) -> tuple[object, ...]:
    return device.name, device.description, device.total, device.worker


def _folder() -> Path:
    """The folder of the cache, or a temporary one if it is not writable."""
    try:
        folder = user_folder("cache")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return Path(tempfile.gettempdir())
    return folder


def _cache_path(found: Hardware) -> Path:
    key = sha256(f"{found.name} {found.engine} {_MEASURED}".encode()).hexdigest()[:16]
    return _folder() / f"hardware-{key}.json"


def _save(path: Path, hardware: Hardware, before: Hardware | None) -> None:
    """Keep the speeds, and those of devices that are absent this time."""
    from dots1_local.files.partial_file import write_whole

    names = {device.name for device in hardware.devices}
    absent = [each for each in (before.devices if before else ()) if each.name not in names]
    kept = replace(hardware, devices=(*hardware.devices, *absent))
    text = json.dumps(kept.to_json(), indent=1) + "\n"
    with suppress(OSError):  # without a file the speeds are measured again next time
        write_whole(path, text.encode())


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The child's part of `detect`."""
    end_if_silent(request.get("answering", ()), child.report_error)
    for endpoint in request["workers"]:
        add_worker(endpoint)
    everything = devices()
    cpu = next((each for each in everything if each.kind == "cpu"), None)
    if cpu is None:
        raise Dots1Error("this llama-cpp-python has no CPU backend; install another build")
    gpus = [each for each in everything if each.kind in ("gpu", "igpu")]
    found = [_device(each, request) for each in (cpu, *gpus)]
    built = f"llama-cpp-python {version('llama-cpp-python')} ({', '.join(backend_names())})"
    return Hardware(
        "this machine", "the engine", built, 1, replace(found[0], name=CPU), tuple(found[1:])
    ).to_json()


def _device(info: DeviceInfo, request: Mapping[str, Any]) -> Device:
    speed = None
    if info.name == request.get("measure"):
        from dots1_local.devices.speed import measure_speed

        speed = measure_speed(info, request["threads"], child.report_progress)
    worker = info.description if info.backend == "RPC" else None
    description = " ".join("".join(filter(str.isprintable, info.description)).split())
    return Device(info.name, info.backend, description, info.free, info.total, speed, worker)


if __name__ == "__main__":
    child.respond(_answer)
