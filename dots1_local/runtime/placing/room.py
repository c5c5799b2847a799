"""What of a machine's memory a placement may take, and what it lacks."""

from dataclasses import replace

from dots1_local.runtime.devices.hardware import CPU, Device, Hardware
from dots1_local.runtime.placing.footprint import footprint
from dots1_local.runtime.placing.placement import Placement
from dots1_local.runtime.placing.steps import Graph

__all__ = [
    "GPU_MARGIN",
    "RAM_MARGIN",
    "fetches_weights",
    "lacking",
    "limited",
    "room_of",
]

# Left free on each GPU: the engine's own context on it, a desktop's windows.
GPU_MARGIN = 1_000_000_000
# Left free in RAM: 1 GB to this program beside the model, 1 GB to what else wakes up.
RAM_MARGIN = 2_000_000_000


def limited(hardware: Hardware, *, vram: int | None = None, ram: int | None = None) -> Hardware:
    """The machine with so many bytes free on each GPU and in RAM, as far as it has them at all."""
    devices, cpu = hardware.devices, hardware.cpu
    if vram is not None:
        devices = tuple(
            device if device.worker else replace(device, free=min(vram, device.total))
            for device in devices
        )
    if ram is not None:
        cpu = replace(cpu, free=min(ram, cpu.total))
    return replace(hardware, devices=devices, cpu=cpu)


def room_of(device: Device, margin: int | None = None) -> int:
    """Bytes of a device that a placement may take; `margin` is left free on GPUs."""
    if device.name == CPU or device.worker:
        return device.free - RAM_MARGIN
    return device.free - (GPU_MARGIN if margin is None else margin)


def lacking(
    graph: Graph, hardware: Hardware, placement: Placement, margin: int | None = None
) -> dict[str, int]:
    """Bytes that each device lacks for what a placement puts there; 0 or less where it fits."""
    return {
        name: usage.total - room_of(hardware.device(name), margin)
        for name, usage in footprint(graph.gguf, placement).items()
    }


def fetches_weights(device: Device) -> bool:
    """Whether a device takes weights from RAM for large batches (`offload_op` in ggml)."""
    return not device.worker and device.backend not in ("CPU", "BLAS", "RPC")
