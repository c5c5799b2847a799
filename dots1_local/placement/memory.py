"""What running a model needs besides its weights, and what a memory leaves for those, in bytes."""

import re
from dataclasses import dataclass

from dots1_local.architecture import Dots1Config, inventory
from dots1_local.devices.hardware import CPU
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.ggml import KV_TYPES, TYPES, quant_type
from dots1_local.placement.compute_buffer import kv_cells, layers_of, reserved
from dots1_local.placement.ubatch_graph import Ubatch, Weight
from dots1_local.sizes import human_bytes, parse_size

__all__ = [
    "Memory",
    "MemoryBudget",
    "compute_bytes",
    "kv_bytes",
    "parse_context",
    "parse_memory",
    "weights_budget",
]

# Left free on each GPU: about 0.5 GB are the driver's context, 0.5 GB the expert tensor streamed
# from RAM while a prompt is processed (0.42 GB at 4.5 bits), the rest a desktop and rounding.
_GPU_RESERVE = 1_500_000_000
# Left free in RAM: 2 GB to the system and other programs, 1 GB to this one beside the model
# (the interpreter, the vocabulary, a ubatch's logits, the CPU's scratch space).
_RAM_RESERVE = 3_000_000_000

_DEVICE = re.compile(r"(?:([1-9]\d?)\s*x\s*)?(.+?)\s*(gpu|vram|ram)", re.IGNORECASE | re.ASCII)
_CONTEXT = re.compile(r"(\d{1,9})(k?)", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Memory:
    """Bytes of each GPU and of the RAM."""

    gpus: tuple[int, ...]
    ram: int

    @property
    def total(self) -> int:
        return sum(self.gpus) + self.ram

    def __str__(self) -> str:
        parts = [f"{human_bytes(gpu)} gpu" for gpu in self.gpus]
        return " + ".join([*parts, f"{human_bytes(self.ram)} ram"] if self.ram else parts)


@dataclass(frozen=True)
class MemoryBudget:
    """How a memory is shared out: `total` = `kv` + `compute` + `reserve` + `weights`.

    `kv_on_gpu` is the share of the KV cache that the GPUs can hold, 0 without one. What they
    cannot hold lies in RAM together with its layers, which then run on the CPU.
    """

    total: int
    kv: int
    compute: int
    reserve: int
    weights: int
    kv_on_gpu: float
    explanation: str


def parse_memory(text: str) -> Memory:
    """A memory from '24GB gpu + 64GB ram', '2x24GiB gpu + 128 GB ram' or '96GB ram'.

    Raises:
        UsageError: it reads otherwise; the message shows the form.
    """
    gpus: list[int] = []
    ram = 0
    for part in text.split("+"):
        match = _DEVICE.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"{text!r} is no memory such as '24GB gpu + 64GB ram' or '96GB ram'")
        count, size = int(match[1] or 1), parse_size(match[2])
        if match[3].lower() == "ram":
            ram += size * count
        else:
            gpus += [size] * count
    return Memory(tuple(gpus), ram)


def parse_context(text: str) -> int:
    """Tokens from '16k' (16,384) or '32768'.

    Raises:
        UsageError: it reads otherwise, or is 0.
    """
    match = _CONTEXT.fullmatch(text.strip())
    if match and (tokens := int(match[1]) * (1024 if match[2] else 1)):
        return tokens
    raise UsageError(f"{text!r} is no context size such as 16k or 32768")


def kv_bytes(config: Dots1Config, n_ctx: int, kv_type: str = "f16") -> int:
    """The KV cache of a context of `n_ctx` tokens: a key and a value a layer and token.

    Raises:
        UsageError: a type that llama.cpp keeps no KV cache in.
    """
    kind = quant_type(kv_type)
    if kind.name not in KV_TYPES:
        raise UsageError(f"no KV cache is kept in {kind.name}; there are {', '.join(KV_TYPES)}")
    row = kind.row_bytes(config.num_key_value_heads * config.head_dim)
    return 2 * config.num_hidden_layers * row * kv_cells(n_ctx)


def compute_bytes(
    config: Dots1Config,
    n_ctx: int,
    n_ubatch: int = 512,
    *,
    n_outputs: int | None = None,
    flash_attention: bool = True,
    kv_type: str = "f16",
) -> int:
    """The buffer that one device computes all layers in, for ubatches of `n_ubatch` tokens.

    `n_outputs` of them have logits: all unless it says otherwise, as llama.cpp's own programs have
    it (`dots1 chat` needs one). Like llama.cpp's default, flash attention is on.
    """
    tokens = min(n_ubatch, n_ctx)
    outputs = tokens if n_outputs is None else min(n_outputs, tokens)
    ubatch = Ubatch(tokens, outputs, 1, kv_cells(n_ctx), kv_type.upper(), flash_attention)
    weights = ((spec.name, Weight(CPU)) for spec in inventory(config))
    layers = layers_of(weights, [CPU] * (config.num_hidden_layers + 1))
    return reserved(config, layers, ubatch)[CPU]


def weights_budget(
    config: Dots1Config, memory: str | Memory, n_ctx: int, kv_type: str = "f16"
) -> MemoryBudget:
    """What is left for the weights of a model that is to run in `memory` with that context.

    Each device has its own compute buffer and its own reserve. The KV cache has the first claim
    to the GPUs, before the weights.

    Raises:
        UsageError: no such memory or KV type, or a context longer than the model was trained for.
        Dots1Error: not even the narrowest types fit, or a device has no room for any weights.
    """
    memory = parse_memory(memory) if isinstance(memory, str) else memory
    if not 0 < n_ctx <= config.max_position_embeddings:
        raise UsageError(
            f"this model was trained for contexts of 1 to {config.max_position_embeddings} tokens, "
            f"not {n_ctx}"
        )
    buffer = compute_bytes(config, n_ctx, kv_type=kv_type)
    _check_devices(memory, buffer)
    budget = _budget(config, memory, n_ctx, kv_type)
    least = _least_weights(config)
    if budget.weights < least:
        raise Dots1Error(
            f"{budget.explanation}, which take at least {human_bytes(least)}; "
            + _way_out(config, memory, n_ctx, kv_type, least)
        )
    return budget


def _budget(config: Dots1Config, memory: Memory, n_ctx: int, kv_type: str) -> MemoryBudget:
    kv, buffer = kv_bytes(config, n_ctx, kv_type), compute_bytes(config, n_ctx, kv_type=kv_type)
    compute = buffer * (len(memory.gpus) + bool(memory.ram))
    reserve = _GPU_RESERVE * len(memory.gpus) + _RAM_RESERVE * bool(memory.ram)
    weights = memory.total - kv - compute - reserve
    gpu_room = sum(gpu - _GPU_RESERVE - buffer for gpu in memory.gpus)
    explanation = (
        f"{memory} - {human_bytes(kv)} KV cache for {n_ctx:,} tokens ({kv_type.lower()}) - "
        f"{human_bytes(compute)} buffers - {human_bytes(reserve)} left free = "
        f"{human_bytes(max(weights, 0))} for weights"
    )
    kv_on_gpu = min(1.0, gpu_room / kv)
    return MemoryBudget(memory.total, kv, compute, reserve, weights, kv_on_gpu, explanation)


def _check_devices(memory: Memory, buffer: int) -> None:
    devices = [(gpu, _GPU_RESERVE, "a GPU", "driver") for gpu in memory.gpus]
    if memory.ram:
        devices.append((memory.ram, _RAM_RESERVE, "RAM", "system"))
    for size, reserve, name, owner in devices:
        if size <= reserve + buffer:
            raise Dots1Error(
                f"{name} of {human_bytes(size)} has no room for weights, as the {owner} and "
                f"llama.cpp's buffers take {human_bytes(reserve + buffer)}; leave it out or "
                "give more"
            )


def _way_out(config: Dots1Config, memory: Memory, n_ctx: int, kv_type: str, least: int) -> str:
    step = kv_cells(1)
    for cells in range(kv_cells(n_ctx) - step, 0, -step):
        if _budget(config, memory, cells, kv_type).weights >= least:
            return f"a context of {cells:,} tokens would fit"
    short = least - _budget(config, memory, step, kv_type).weights
    return f"no context fits, and the shortest one lacks {human_bytes(short)}"


def _least_weights(config: Dots1Config) -> int:
    """What the file has at least, were every weight in the narrowest type there is."""
    bpw = min(kind.bpw for kind in TYPES.values())
    return int(sum(spec.elements for spec in inventory(config)) * bpw / 8)
