"""`dots1 hardware`: show the devices of a machine, their memory and their speeds."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dots1_local.cli._options import Json, Workers, flag, option, verb
from dots1_local.cli._output import notice, print_json, print_table, progress_bar
from dots1_local.errors import UsageError
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from dots1_local.devices.hardware import Device, Hardware, Speed

__all__ = ["HardwareOptions", "hardware"]


@dataclass(frozen=True, eq=False, repr=False)
class HardwareOptions:
    file: str | None = option(
        "Show the machine that this file or name describes.",
        "--hardware",
        metavar="FILE",
        default="this machine",
    )
    worker: Workers = None
    refresh: bool = flag("Measure again what was measured before.", "--refresh")
    json: Json = False


@verb
def hardware(options: HardwareOptions) -> None:
    """Show this machine's devices; the first time, measure them, which takes a minute.

    dots1 hardware

    dots1 hardware --worker 10.0.0.2:50052

    dots1 hardware --json > machine.json
    """
    from dots1_local.devices.drivers import missing_backends
    from dots1_local.devices.machine import find_hardware, this_machine

    if options.file is not None:
        if options.worker or options.refresh:
            raise UsageError("--hardware shows a description; leave out --worker and --refresh")
        found = find_hardware(options.file)
    else:
        with progress_bar("measuring") as report:
            found = this_machine(
                options.worker or [],
                measure="again" if options.refresh else True,
                progress=report,
            )
    if options.json:
        print_json(found.to_json())
    else:
        _show(found)
    for sentence in missing_backends(found.engine) if options.file is None else ():
        notice(sentence)


def _show(machine: "Hardware") -> None:
    print(f"{machine.name}: {machine.cores} cores, {machine.engine}")
    print(f"{machine.source}\n")
    devices = [machine.cpu, *machine.devices]
    header = ("device", "description", "free", "total", "reads", "per node", "per split")
    print_table(header, [_device_row(device) for device in devices], numbers_from=2)
    print()
    for line in _links(machine):
        print(line)
    for device in devices:
        if device.speed is not None:
            print(f"\n{device.name}, billions of multiply-adds per second")
            _print_speed(device.speed)


def _device_row(device: "Device") -> tuple[str, ...]:
    backend = "" if device.backend == "CPU" else f" ({device.backend})"
    memory = human_bytes(device.free), human_bytes(device.total)
    speeds: tuple[str, ...] = ("-", "-", "-")
    if (speed := device.speed) is not None:
        node, split = f"{speed.node * 1e6:.1f} µs", f"{speed.split * 1e6:.0f} µs"
        speeds = (f"{human_bytes(speed.bandwidth)}/s", node, split)
    return (device.name, f"{device.description}{backend}", *memory, *speeds)


def _links(machine: "Hardware") -> Iterator[str]:
    for device in machine.devices:
        if (speed := device.speed) is not None:
            yield (
                f"{device.name} takes {human_bytes(speed.upload)}/s from pinned RAM, "
                f"{human_bytes(speed.upload_pageable)}/s from any other"
            )
    disk = "not measured" if machine.disk is None else f"{human_bytes(machine.disk)}/s"
    yield f"disk: {disk}"


def _print_speed(speed: "Speed") -> None:
    from dots1_local.ggml import TYPES

    header = ["type", "decode", "reading", "prefill, experts", "others"]
    header += ["repacked: decode", "prefill"] if speed.repacked else []
    rows = []
    for kind in TYPES.values():
        if (rate := speed.matmul.get(kind.name)) is None:
            continue
        read = min(speed.bandwidth, rate.decode * kind.bpw / 8)
        row = [kind.name, _billions(rate.decode), f"{human_bytes(read)}/s"]
        row += [_billions(rate.prefill), _billions(rate.dense or rate.prefill)]
        if speed.repacked:
            other = speed.repacked.get(kind.name)
            row += [_billions(other.decode), _billions(other.prefill)] if other else ["-", "-"]
        rows.append(row)
    print_table(header, rows, numbers_from=1)
    print()
    rows = [[n, _billions(r.decode), _billions(r.prefill)] for n, r in speed.attention.items()]
    print_table(["KV cache", "decode", "prefill"], rows, numbers_from=1)


def _billions(rate: float) -> str:
    return f"{rate / 1e9:,.1f}"
