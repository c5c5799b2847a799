"""How many bytes of each device a placement takes, by what they are for.

Weights, KV cache and compute buffers are what llama.cpp logs, alignment and padding of tensors (a
few kB) aside. What a mapped file's weights take of RAM is page cache, which the system takes back
where it is short, and reads again from disk; plain, pinned and repacked weights it cannot take.

What of a machine's memory a placement may take, and what it lacks.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import CPU, Device, Hardware
from dots1_local.errors import UsageError
from dots1_local.files.gguf import GGUFFile, GGUFTensor, role_of
from dots1_local.placement.compute_buffer import compute_buffers
from dots1_local.placement.graph_memory import CUDA
from dots1_local.placement.memory import kv_bytes
from dots1_local.placement.placement import Placement
from dots1_local.placement.steps import Graph

__all__ = [
    "GPU_MARGIN",
    "RAM_MARGIN",
    "Usage",
    "compute_buffers",
    "devices_of",
    "fetches_weights",
    "footprint",
    "lacking",
    "limited",
    "room_of",
    "unattended",
]


@dataclass(frozen=True)
class Usage:
    """Bytes of one device by what they hold; `compute` is the buffer the engine computes in.

    `scratch` comes later, with the first long prompt, and no log tells of it: activations as the
    kernels want them, and in RAM the logits besides.
    """

    attention: int = 0
    dense: int = 0
    shared: int = 0
    routed: int = 0
    router: int = 0
    norm: int = 0
    embedding: int = 0
    head: int = 0
    kv: int = 0
    compute: int = 0
    scratch: int = 0

    @property
    def weights(self) -> int:
        return self.total - self.kv - self.compute - self.scratch

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def devices_of(tensors: Iterable[GGUFTensor], placement: Placement) -> dict[str, str]:
    """The device of every tensor, by its name."""
    return {tensor.name: placement.device_of(tensor.name) for tensor in tensors}


def footprint(
    gguf: GGUFFile, placement: Placement, *, n_sequences: int = 1, n_outputs: int = 1
) -> dict[str, Usage]:
    """What the devices of a placement hold, the CPU included.

    There are so many KV caches (`n_sequences`) as the placement has one; `n_outputs` tokens of a
    ubatch have logits, or at least one for each sequence.

    Raises:
        GGUFError: no dots1 model, or one that lacks something.
        UsageError: the placement is for a model of another depth.
    """
    config = Dots1Config.from_gguf(gguf.keys, gguf.files[0])
    if placement.blocks != config.num_hidden_layers:
        raise UsageError(
            f"this placement is for a model of {placement.blocks} blocks, and {gguf.files[0]} has "
            f"{config.num_hidden_layers}; plan again"
        )
    devices = devices_of(gguf.tensors, placement)
    names = (*placement.used_devices, CPU)
    usage = {name: dict.fromkeys((f.name for f in fields(Usage)), 0) for name in names}
    for tensor in gguf.tensors:
        usage[devices[tensor.name]][role_of(tensor.name) or "norm"] += tensor.nbytes
    layer_kv = kv_bytes(config, placement.tokens, placement.kv_type) // config.num_hidden_layers
    for layer in range(placement.blocks):
        usage[placement.device_of_layer(layer)]["kv"] += layer_kv * n_sequences
    buffers = compute_buffers(
        config, placement, gguf.tensors, devices, n_sequences=n_sequences, n_outputs=n_outputs
    )
    for name, size in buffers.items():
        usage[name]["compute"] = size
    tokens = min(placement.ubatch, placement.tokens * n_sequences)
    for name, sizes in usage.items():
        sizes["scratch"] = _scratch(config, name, tokens, computes=bool(sizes["routed"]))
    rows = max(min(n_outputs, tokens), placement.sequences * n_sequences)
    usage[CPU]["scratch"] += 4 * config.vocab_size * rows
    return {name: Usage(**sizes) for name, sizes in usage.items()}


def _scratch(config: Dots1Config, device: str, tokens: int, *, computes: bool) -> int:
    """What a ubatch's MoE product needs most: its input at 8 bits and who goes to which expert.

    `computes`: whether the device has experts. See `ggml_graph_plan` for the CPU, where every
    expert has room for every token, and `ggml_cuda_mul_mat_q`, to which GPUs come in the end.
    """
    chosen = tokens * config.num_experts_per_tok
    if device.startswith(CUDA):
        return chosen * config.hidden_size * 36 // 32
    if device == CPU and computes:
        rows = chosen * config.moe_intermediate_size * 34 // 32
        return rows + 8 * chosen * config.n_routed_experts
    return 0


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
