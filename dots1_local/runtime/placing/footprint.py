"""How many bytes of each device a placement takes, by what they are for.

Weights, KV cache and compute buffers are what llama.cpp logs, alignment and padding of tensors (a
few kB) aside. What a mapped file's weights take of RAM is page cache, which the system takes back
where it is short, and reads again from disk; plain, pinned and repacked weights it cannot take.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from dots1_local.architecture import Dots1Config
from dots1_local.errors import GGUFError, UsageError
from dots1_local.gguf_file import GGUFFile, GGUFTensor, role_of
from dots1_local.runtime.devices.hardware import CPU
from dots1_local.runtime.placing.compute_buffer import compute_buffers
from dots1_local.runtime.placing.graph_memory import CUDA
from dots1_local.runtime.placing.memory import kv_bytes
from dots1_local.runtime.placing.placement import Placement
from dots1_local.verify.numbers import config_of

__all__ = ["Usage", "compute_buffers", "devices_of", "footprint"]


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
    config = config_of(gguf)
    if config is None:
        raise GGUFError(f"{gguf.files[0]} lacks numbers of the model; run dots1 verify on it")
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
