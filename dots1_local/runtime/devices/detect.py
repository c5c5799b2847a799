"""The devices that the engine finds, and their speeds, asked for in a process of its own.

    python -m dots1_local.runtime.devices.detect '{"workers": [], "measure": "CPU", "threads": 2}'

answers with a machine's description and, in it, the speed of the device to be measured.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from dots1_local.documents import Fields
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.progress import Progress, silent
from dots1_local.runtime.devices import child
from dots1_local.runtime.devices.backends import DeviceInfo, add_worker, backend_names, devices
from dots1_local.runtime.devices.hardware import CPU, Device, Hardware, hardware_from

__all__ = ["detect"]

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
    from dots1_local.runtime.devices.speed import measure_speed

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
