"""The placements that ours is compared with: those that people make by hand with llama.cpp's flags.

All have the context, KV type, ubatch and threads of ours, so that they differ in what lies where.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from dots1_local.devices.hardware import CPU, Hardware
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.footprint import Usage, footprint, room_of
from dots1_local.placement.placement import Placement
from dots1_local.placement.planner import place

__all__ = ["all_on_cpu", "compared", "experts_in_ram", "with_ubatch"]

_EXPERTS = r"ffn_(up|down|gate)_exps"


def compared(gguf: GGUFFile, machine: Hardware, ours: Placement) -> Iterator[tuple[str, Placement]]:
    """Others by name, on the machine's first device or none; what does not fit it is left out."""
    if machine.devices:
        device = machine.devices[0]
        yield "all routed experts in RAM", experts_in_ram(machine, ours, range(ours.blocks))
        by_count = [experts_in_ram(machine, ours, range(n)) for n in range(ours.blocks + 1)]
        count = _least(gguf, machine, by_count)
        if count:  # with none in RAM it would be all on the device
            yield f"experts of the first {count} layers in RAM", by_count[count]
        bare = experts_in_ram(machine, ours, ())
        wholes = [replace(bare, layers={device.name: n}) for n in range(ours.blocks + 1, 0, -1)]
        count = _least(gguf, machine, wholes)
        if count is not None:
            yield f"last {wholes[count].gpu_layers} layers whole on the device", wholes[count]
    if ours.layers:
        yield "all on the CPU", all_on_cpu(ours)


def all_on_cpu(ours: Placement) -> Placement:
    """Nothing on any device."""
    return replace(
        ours, layers={}, overrides=(), workers=(), host_memory="repacked", offload_min_batch=None
    )


def experts_in_ram(machine: Hardware, ours: Placement, layers: Iterable[int]) -> Placement:
    """All on the machine's first device but some layers' routed experts, as --n-cpu-moe has it."""
    device = machine.devices[0]
    workers = (device.worker,) if device.worker else ()
    return replace(
        ours,
        layers={device.name: ours.blocks + 1},
        overrides=tuple((rf"blk\.{layer}\.{_EXPERTS}", CPU) for layer in layers),
        workers=workers,
        host_memory="plain" if workers else "pinned",
        offload_min_batch=None,
    )


def with_ubatch(gguf: GGUFFile, machine: Hardware, ours: Placement, ubatch: int) -> Placement:
    """Ours with another ubatch, and with as few experts on devices as that leaves room for."""
    placement = replace(ours, ubatch=ubatch)
    before, after = footprint(gguf, ours), footprint(gguf, placement)
    devices = tuple(
        replace(device, free=max(0, device.free - _growth(before, after, device.name)))
        for device in machine.devices
    )
    planned = place(
        gguf,
        replace(machine, devices=devices),
        context=ours.context,
        sequences=ours.sequences,
        kv_type=ours.kv_type,
    )
    return replace(placement, layers=planned.layers, overrides=planned.overrides)


def _growth(before: Mapping[str, Usage], after: Mapping[str, Usage], device: str) -> int:
    """Bytes that buffers on a device grow by."""
    none = Usage()
    return after.get(device, none).compute - before.get(device, none).compute


def _least(gguf: GGUFFile, machine: Hardware, placements: Sequence[Placement]) -> int | None:
    """The place of the first that fits the device; each takes less of it than the one before."""
    device = machine.devices[0]
    for number, placement in enumerate(placements):
        if footprint(gguf, placement)[device.name].total <= room_of(device):
            return number
    return None
