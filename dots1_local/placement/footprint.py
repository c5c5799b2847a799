"""How many bytes of each device a placement takes, and how many it may take.

Weights, KV cache and compute buffers are what llama.cpp logs, apart from a few kB of padding. The
weights of a mapped file are page cache: if RAM is short, the system drops them and reads them from
disk again. It cannot drop plain, pinned and repacked weights.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, groupby, islice

from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import CPU, Device, Hardware
from dots1_local.errors import UsageError
from dots1_local.files.gguf import GGUFTensor, role_of
from dots1_local.ggml import KV_TYPES, quant_type
from dots1_local.placement.graph_memory import CUDA, LLAMA_MIN_BATCH, reserved_buffers
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import Placement
from dots1_local.placement.ubatch_graph import PlacedLayer, PlacedWeight, UbatchShape

__all__ = [
    "GPU_RESERVE", "RAM_RESERVE", "REPACKED", "Usage", "distinct_layers", "fetching_gpu",
    "footprint", "kv_bytes", "kv_cells", "kv_type_unsupported", "limited", "scratch_bytes",
    "shortfall", "usable_bytes",
]  # fmt: skip

# Bytes left free: on each GPU for the driver's context and a desktop's windows, in RAM 1 GB for
# this program besides the model and 1 GB for the rest of the system.
GPU_RESERVE, RAM_RESERVE = 1_000_000_000, 2_000_000_000
# Types that the CPU's kernels rearrange so that no GPU can read them (ggml-cpu/repack.cpp).
REPACKED = ("Q4_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4")
# Devices that copy weights from RAM for large batches (their backends have an `offload_op`).
_FETCHING = ("CUDA", "ROCm", "MUSA", "Vulkan", "SYCL", "MTL", "CANN")
_CUDA_LACKS = ("IQ4_NL",)  # KV types without flash attention (ggml_cuda_fattn_kv_type_supported)
_KV_CELLS = 256  # llama.cpp rounds the context of a sequence up to a multiple of this
_EQUAL_LAYERS = 3  # so many of a row of equal layers need as much memory as all of them


@dataclass(frozen=True)
class Usage:
    """Bytes of one device by purpose; `compute` is llama.cpp's compute buffer.

    `scratch` is allocated with the first long prompt: activations in the form that the kernels
    need, and in RAM also the logits. No log shows it.
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
        return self.total - self.kv - self.buffers

    @property
    def buffers(self) -> int:
        return self.compute + self.scratch

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def footprint(
    graph: ModelGraph,
    placement: Placement,
    *,
    n_sequences: int = 1,
    n_outputs: int = 1,
    n_seq_max: int = 1,
) -> dict[str, Usage]:
    """Return what each device of a placement holds, including the CPU.

    There are `n_sequences` KV caches of the placement's size. `n_outputs` tokens of a ubatch have
    logits, but at least one for each sequence; llama.cpp is told of `n_seq_max` sequences, or of
    those of the placement if they are more.

    Raises:
        GGUFError: the model lacks a weight.
        UsageError: the placement is for a model of another depth.
    """
    config, tensors = graph.config, graph.tensors
    if placement.blocks != config.num_hidden_layers:
        raise UsageError(
            f"this placement is for a model of {placement.blocks} blocks, but "
            f"{graph.path} has {config.num_hidden_layers}; plan again"
        )
    usage = {name: Counter[str]() for name in (*placement.used_devices, CPU)}
    for tensor in tensors:
        usage[placement.device_of(tensor.name)][role_of(tensor.name) or "norm"] += tensor.nbytes
    layer_kv = kv_bytes(config, placement.tokens, placement.kv_type) // config.num_hidden_layers
    for layer in range(placement.blocks):
        usage[placement.device_of_layer(layer)]["kv"] += layer_kv * n_sequences
    sequences = max(n_seq_max, placement.sequences * n_sequences)
    outputs = max(n_outputs, sequences)
    for name, size in _compute_buffers(graph, placement, n_sequences, sequences, outputs).items():
        usage[name]["compute"] = size
    tokens = min(placement.ubatch, placement.tokens * n_sequences)
    for name, sizes in usage.items():
        if name.startswith("Vulkan") and sizes["routed"] and sizes["shared"]:
            sizes["compute"] += _computed_early(config, tokens)
    for name, sizes in usage.items():
        sizes["scratch"] = scratch_bytes(config, name, tokens, has_experts=bool(sizes["routed"]))
    rows = max(min(n_outputs, tokens), sequences)
    usage[CPU]["scratch"] += 4 * config.vocab_size * rows
    return {name: Usage(**sizes) for name, sizes in usage.items()}


def kv_bytes(config: Dots1Config, n_ctx: int, kv_type: str = "f16") -> int:
    """Bytes of the KV cache for `n_ctx` tokens: a key and a value for each layer and token.

    Raises:
        UsageError: llama.cpp cannot keep a KV cache in this type.
    """
    if kv_type.upper() not in KV_TYPES:
        raise UsageError(
            f"llama.cpp cannot keep a KV cache in {kv_type.upper()}; "
            f"choose one of {', '.join(KV_TYPES)}"
        )
    kind = quant_type(kv_type)
    row = kind.row_bytes(config.num_key_value_heads * config.head_dim)
    return 2 * config.num_hidden_layers * row * kv_cells(n_ctx)


def kv_cells(context: int) -> int:
    """Tokens that the KV cache of a context really holds."""
    return -(-context // _KV_CELLS) * _KV_CELLS


def _compute_buffers(
    graph: ModelGraph, placement: Placement, n_sequences: int, sequences: int, outputs: int
) -> Mapping[str, int]:
    """The compute buffer of each device; a GPU's holds the weights that it copies from RAM too."""
    gpu = fetching_gpu(placement)
    kept = REPACKED if placement.host_memory == "repacked" else ()
    resident = {name: PlacedWeight(name) for name in (*placement.used_devices, CPU)}

    def placed(tensor: GGUFTensor) -> PlacedWeight:
        device = placement.device_of(tensor.name)
        if gpu is not None and device == CPU and tensor.type not in kept:
            return PlacedWeight(CPU, tensor.nbytes, fetched=True)
        return resident[device]

    layers = [
        PlacedLayer(
            placement.device_of_layer(number),
            tuple((part, placed(tensor)) for part, tensor in parts.items()),
        )
        for number, parts in enumerate(graph.layers)
    ]
    tokens = min(placement.ubatch, placement.tokens * n_sequences)
    ubatch = UbatchShape(
        tokens=-(-tokens // sequences) * sequences,
        outputs=min(tokens, outputs),
        streams=n_sequences,
        cells=kv_cells(placement.tokens),
        kv_type=placement.kv_type,
        flash_attention=placement.flash_attention,
    )
    offloaded = placement.gpu_layers > placement.blocks
    return reserved_buffers(
        graph.config,
        distinct_layers(layers),
        ubatch,
        gpu=gpu,
        min_batch=placement.offload_min_batch or LLAMA_MIN_BATCH,
        offloaded=offloaded,
        pipelined=offloaded and len(placement.layers) > 1 and not placement.overrides,
    )


def fetching_gpu(placement: Placement) -> str | None:
    """The first GPU, if its backend copies weights from RAM for large batches."""
    return next((name for name in placement.used_devices if name.startswith(_FETCHING)), None)


def _computed_early(config: Dots1Config, tokens: int) -> int:
    """Bytes that Vulkan's order of nodes needs besides those of llama.cpp's order.

    `ggml_vk_graph_optimize` moves the first products of the shared experts before the routed
    experts, and keeps the router's scores. Where a ubatch needs most elsewhere, this is too much.
    """
    shared = 2 * config.moe_intermediate_size * config.n_shared_experts
    return 4 * tokens * (shared + config.n_routed_experts)


def distinct_layers(layers: Sequence[PlacedLayer]) -> tuple[PlacedLayer, ...]:
    """A few layers for each row of equal ones; the last layer is the output layer."""
    rows = (islice(row, _EQUAL_LAYERS) for _, row in groupby(layers[:-1]))
    return (*chain.from_iterable(rows), layers[-1])


def scratch_bytes(
    config: Dots1Config, device: str, tokens: int, *, has_experts: bool = True
) -> int:
    """The largest scratch of a ubatch's MoE products: inputs at 8 bits, and the experts' tokens.

    See `ggml_graph_plan` for the CPU, which has
    room for every token at every expert, and `ggml_cuda_mul_mat_q` for GPUs.
    """
    chosen = tokens * config.num_experts_per_tok
    if device.startswith(CUDA):
        return chosen * config.hidden_size * 36 // 32
    if device == CPU and has_experts:
        rows = chosen * config.moe_intermediate_size * 34 // 32
        return rows + 8 * chosen * config.n_routed_experts
    return 0


def limited(hardware: Hardware, *, vram: int | None = None, ram: int | None = None) -> Hardware:
    """The machine with at most `vram` bytes free on each GPU and `ram` bytes free in RAM."""

    def with_limit(device: Device) -> Device:
        limit = ram if device.name == CPU else None if device.worker else vram
        return device if limit is None else replace(device, free=min(limit, device.total))

    devices = tuple(with_limit(device) for device in hardware.devices)
    return replace(hardware, devices=devices, cpu=with_limit(hardware.cpu))


def usable_bytes(device: Device) -> int:
    """Bytes of a device that a placement may take: what is free less the reserve."""
    in_ram = device.name == CPU or device.worker
    return device.free - (RAM_RESERVE if in_ram else GPU_RESERVE)


def shortfall(graph: ModelGraph, hardware: Hardware, placement: Placement) -> dict[str, int]:
    """Bytes that each device lacks for a placement; 0 or less where it fits."""
    return {
        name: usage.total - usable_bytes(hardware.device(name))
        for name, usage in footprint(graph, placement).items()
    }


def kv_type_unsupported(hardware: Hardware, placement: Placement) -> str | None:
    """A sentence if a GPU holds a KV cache that its flash attention cannot read, else None."""
    kind = placement.kv_type
    holders = {placement.device_of_layer(layer) for layer in range(placement.blocks)}
    for device in hardware.devices:
        if device.worker or device.name not in holders or not placement.flash_attention:
            continue  # only a few types are measured on a worker
        known = list(device.speed.attention) if device.speed else []
        if kind not in known if known else device.backend in CUDA and kind in _CUDA_LACKS:
            return f"{device.name} cannot compute attention over a KV cache in {kind}; " + (
                f"it can in {', '.join(known)}" if known else "choose F16 or Q8_0"
            )
    return None
