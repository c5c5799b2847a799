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
    "unattended",
]

_CUDA = ("CUDA", "ROCm", "MUSA")
_CUDA_LACKS = ("IQ4_NL",)  # flash attention over it (ggml_cuda_fattn_kv_type_supported)
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


def unattended(hardware: Hardware, placement: Placement) -> str | None:
    """A sentence where a GPU has a KV cache that its flash attention does not do; None else.

    The engine would attend on the CPU then, and copy the KV cache there for every token.
    """
    kind = placement.kv_type
    holders = {placement.device_of_layer(layer) for layer in range(placement.blocks)}
    for device in hardware.devices:
        known = list(device.speed.attention) if device.speed else []
        unable = kind not in known if known else device.backend in _CUDA and kind in _CUDA_LACKS
        # a worker is asked for a few types only
        if device.name in holders and not device.worker and placement.flash_attention and unable:
            return f"{device.name} cannot attend to a KV cache in {kind}" + (
                f", only in {', '.join(known)}" if known else "; take F16 or Q8_0"
            )
    return None
