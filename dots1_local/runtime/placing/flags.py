"""A placement as llama.cpp's own programs take it on their command line (common/arg.cpp)."""

import shlex
from collections.abc import Iterator

from dots1_local.runtime.devices.hardware import CPU, Hardware
from dots1_local.runtime.placing.placement import MIN_BATCH, Placement

__all__ = ["command_line", "llama_flags"]

# Host memory by flags: GPUs' pinned buffers come first where nothing is mapped, repacked ones next.
_HOST_MEMORY = {
    "pinned": ("-lm", "none"),
    "repacked": ("-lm", "none", "--no-host"),
    "plain": ("-lm", "none", "--no-host", "--no-repack"),
    "mapped": ("-lm", "mmap", "--no-repack"),
}


def llama_flags(placement: Placement, hardware: Hardware) -> list[str]:
    """Flags of llama-cli, llama-server and the like, the model's path not among them."""
    flags = ["--rpc", ",".join(placement.workers)] if placement.workers else []
    flags += ["-dev", ",".join(placement.devices) or "none", "-ngl", str(placement.gpu_layers)]
    if len(placement.devices) > 1:
        flags += ["-ts", ",".join(map(str, placement.layers.values()))]
    if placement.overrides:
        flags += ["-ot", ",".join(_overrides(placement, hardware))]
    ubatch, kv_type = str(placement.ubatch), placement.kv_type.lower()
    flags += ["-c", str(placement.tokens), "-b", ubatch, "-ub", ubatch]
    if placement.sequences > 1:
        flags += ["-np", str(placement.sequences), "-kvu"]
    flags += ["-ctk", kv_type, "-ctv", kv_type, "-fa", "on" if placement.flash_attention else "off"]
    flags += ["-t", str(placement.threads), *_HOST_MEMORY[placement.host_memory], "-fit", "off"]
    return flags


def command_line(placement: Placement, hardware: Hardware, model: str) -> str:
    """What a shell takes, `llama-server` standing for any of llama.cpp's programs."""
    command = ["llama-server", "-m", model, *llama_flags(placement, hardware)]
    environment = ""
    if placement.offload_min_batch is not None:
        environment = f"{MIN_BATCH}={placement.offload_min_batch} "
    return environment + shlex.join(command)


def _overrides(placement: Placement, hardware: Hardware) -> Iterator[str]:
    for pattern, device in placement.overrides:
        yield f"{pattern}={_buffer(hardware, device)}"


def _buffer(hardware: Hardware, name: str) -> str:
    """The name of a device's buffers; a worker's devices are counted by themselves in it."""
    device = hardware.device(name)
    if name == CPU or device.worker is None:
        return name
    number = [each.name for each in hardware.devices if each.worker == device.worker].index(name)
    return f"RPC{number}[{device.worker}]"
