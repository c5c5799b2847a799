"""How many bytes of weights fit a memory beside what else running the model needs."""

import re
from dataclasses import dataclass
from functools import lru_cache

from dots1_local.architecture import Dots1Config, inventory
from dots1_local.devices.hardware import CPU, Hardware
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.ggml import TYPES
from dots1_local.placement.footprint import (
    GPU_RESERVE,
    RAM_RESERVE,
    distinct_layers,
    kv_bytes,
    kv_cells,
    scratch_bytes,
)
from dots1_local.placement.graph_memory import reserved_buffers
from dots1_local.placement.ubatch_graph import PlacedLayer, PlacedWeight, UbatchShape
from dots1_local.sizes import human_bytes, parse_size

__all__ = [
    "Memory",
    "MemoryBudget",
    "compute_bytes",
    "memory_of",
    "parse_context",
    "parse_memory",
    "weights_budget",
]

_DEVICE = re.compile(r"(?:([1-9]\d?)\s*x\s*)?(.+?)\s*(gpu|vram|ram)", re.IGNORECASE | re.ASCII)
_CONTEXT = re.compile(r"(\d{1,9})(k?)", re.IGNORECASE | re.ASCII)
_UBATCH = 512  # tokens, which leaves `place` the choice of a shorter or longer one
_WIDEST = 1.5  # the size of the largest routed matrix, relative to one of average bits per weight


@dataclass(frozen=True)
class Memory:
    """Bytes of each GPU, of the RAM, and of each worker."""

    gpus: tuple[int, ...]
    ram: int
    workers: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.gpus) + self.ram + sum(self.workers)

    @property
    def reserve(self) -> int:
        """Bytes that a placement leaves free."""
        return GPU_RESERVE * len(self.gpus) + RAM_RESERVE * (bool(self.ram) + len(self.workers))

    def __str__(self) -> str:
        parts = [f"{human_bytes(gpu)} gpu" for gpu in self.gpus]
        parts += [f"{human_bytes(worker)} worker" for worker in self.workers]
        return " + ".join([*parts, f"{human_bytes(self.ram)} ram"] if self.ram else parts)


@dataclass(frozen=True)
class MemoryBudget:
    """How a memory is divided, in bytes: it is `kv` + `buffers` + `reserve` + `weights`.

    `buffers` includes the part of a GPU that is smaller than one more matrix.
    """

    kv: int
    buffers: int
    reserve: int
    weights: int
    explanation: str


def memory_of(hardware: Hardware) -> Memory:
    """The free memory of a machine."""
    gpus = tuple(device.free for device in hardware.devices if not device.worker)
    workers = tuple(device.free for device in hardware.devices if device.worker)
    return Memory(gpus, hardware.cpu.free, workers)


def parse_memory(text: str) -> Memory:
    """Parse '24GB gpu + 64GB ram', '2x24GiB gpu + 128 GB ram' or '96GB ram'.

    Raises:
        UsageError: the text has another form; the message shows the right one.
    """
    gpus: list[int] = []
    ram = 0
    for part in text.split("+"):
        match = _DEVICE.fullmatch(part.strip())
        if match is None:
            raise UsageError(
                f"{text!r} is not a memory; write it as '24GB gpu + 64GB ram' or '96GB ram'"
            )
        count, size = int(match[1] or 1), parse_size(match[2])
        if match[3].lower() == "ram":
            ram += size * count
        else:
            gpus += [size] * count
    return Memory(tuple(gpus), ram)


def parse_context(text: str) -> int:
    """Parse a number of tokens: '16k' is 16,384, '32768' is itself.

    Raises:
        UsageError: the text has another form, or the number is 0.
    """
    match = _CONTEXT.fullmatch(text.strip())
    if match and (tokens := int(match[1]) * (1024 if match[2] else 1)):
        return tokens
    raise UsageError(f"{text!r} is not a context size; write it as 16k or 32768")


def weights_budget(
    config: Dots1Config, memory: str | Memory, n_ctx: int, kv_type: str = "f16"
) -> MemoryBudget:
    """Return how many bytes of weights fit `memory` beside a context of `n_ctx` tokens.

    `place` fits a file of this size into this memory: the reserve is the one that it leaves free.

    Raises:
        UsageError: the memory or the KV type is unknown, or the context is longer than the model
            was trained for.
        Dots1Error: not even the narrowest types fit, or a device has no room for any weights.
    """
    memory = parse_memory(memory) if isinstance(memory, str) else memory
    if not 0 < n_ctx <= config.max_position_embeddings:
        raise UsageError(
            f"this model was trained for contexts of 1 to {config.max_position_embeddings} tokens, "
            f"not {n_ctx}"
        )
    budget, least = _budget(config, memory, n_ctx, kv_type), _least_weights(config)
    _check_devices(config, memory, n_ctx, kv_type)
    if budget.weights < least:
        raise Dots1Error(
            f"{budget.explanation}, which take at least {human_bytes(least)}; "
            + _way_out(config, memory, n_ctx, kv_type, least)
        )
    return budget


def compute_bytes(
    config: Dots1Config,
    n_ctx: int,
    n_ubatch: int = _UBATCH,
    *,
    device: str = CPU,
    fetched: int = 0,
    n_outputs: int = 1,
    flash_attention: bool = True,
    kv_type: str = "f16",
) -> int:
    """The buffer in which one device computes all layers, for ubatches of `n_ubatch` tokens.

    `n_outputs` tokens of a ubatch have logits. If `fetched` is not 0, the routed experts are in RAM
    in matrices of `fetched` bytes, and the device copies them.
    """
    tokens = min(n_ubatch, n_ctx)
    outputs = min(n_outputs, tokens)
    ubatch = UbatchShape(tokens, outputs, 1, kv_cells(n_ctx), kv_type.upper(), flash_attention)
    own, copied = PlacedWeight(device), PlacedWeight(CPU, fetched, fetched=True)
    parts: list[list[tuple[str, PlacedWeight]]]
    parts = [[] for _ in range(config.num_hidden_layers + 1)]
    for spec in inventory(config):
        if spec.role != "embedding":
            weight = copied if fetched and spec.role == "routed" else own
            parts[-1 if spec.layer is None else spec.layer].append((spec.part, weight))
    layers = distinct_layers([PlacedLayer(device, tuple(each)) for each in parts])
    return reserved_buffers(config, layers, ubatch, gpu=device if fetched else None)[device]


def _budget(config: Dots1Config, memory: Memory, n_ctx: int, kv_type: str) -> MemoryBudget:
    kv, reserve = kv_bytes(config, n_ctx, kv_type), memory.reserve
    rest = memory.total - kv - reserve
    buffers = sum(_buffers(config, memory, n_ctx, kv_type, rest))
    weights = rest - buffers
    explanation = (
        f"{memory} - {human_bytes(kv)} KV cache for {n_ctx:,} tokens ({kv_type.lower()}) - "
        f"{human_bytes(buffers)} buffers - {human_bytes(reserve)} left free = "
        f"{human_bytes(max(weights, 0))} for weights"
    )
    return MemoryBudget(kv, buffers, reserve, weights, explanation)


def _buffers(
    config: Dots1Config, memory: Memory, n_ctx: int, kv_type: str, weights: int
) -> list[int]:
    """Bytes that hold no weights on each GPU, each worker and in RAM.

    They are compute buffers and scratch. If there is RAM, the first GPU also has room for a matrix
    of routed experts that it copies, and each GPU has a rest that one more matrix does not fit; a
    worker has a rest that one more layer's three do not fit. `weights` is an upper limit of the
    bytes of all weights, which the size of a matrix follows from.
    """
    experts = config.n_routed_experts * config.hidden_size * config.moe_intermediate_size
    shared = memory.ram or memory.workers
    matrix = int(_WIDEST * max(0, weights) * experts / _elements(config)) if shared else 0

    def buffer(device: str, fetched: int = 0) -> int:
        compute = compute_bytes(config, n_ctx, device=device, fetched=fetched, kv_type=kv_type)
        return compute + scratch_bytes(config, device, _UBATCH)

    fetched = [matrix if memory.ram and not number else 0 for number in range(len(memory.gpus))]
    buffers = [buffer("CUDA0", nbytes) + matrix for nbytes in fetched]
    buffers += [buffer("RPC0") + 3 * matrix for _ in memory.workers]
    return [*buffers, buffer(CPU) + 4 * config.vocab_size] if memory.ram else buffers


def _check_devices(config: Dots1Config, memory: Memory, n_ctx: int, kv_type: str) -> None:
    """Check that each device has room for weights beside buffers and the reserve."""
    sizes = [*memory.gpus, *memory.workers, *[memory.ram] * bool(memory.ram)]
    names = ["a GPU"] * len(memory.gpus) + ["a worker"] * len(memory.workers) + ["RAM"]
    buffers = _buffers(config, memory, n_ctx, kv_type, _least_weights(config))
    for size, name, buffer in zip(sizes, names, buffers, strict=False):
        taken = buffer + (GPU_RESERVE if name == "a GPU" else RAM_RESERVE)
        if size <= taken:
            owner = "driver" if name == "a GPU" else "system"
            raise Dots1Error(
                f"{name} of {human_bytes(size)} has no room for weights, because the {owner} and "
                f"llama.cpp's buffers take {human_bytes(taken)}; leave it out or give more"
            )


def _way_out(config: Dots1Config, memory: Memory, n_ctx: int, kv_type: str, least: int) -> str:
    """Name the longest context that fits, or say how much is missing for the shortest."""
    step = kv_cells(1)
    for cells in range(kv_cells(n_ctx) - step, 0, -step):
        if _budget(config, memory, cells, kv_type).weights >= least:
            return f"a context of {cells:,} tokens would fit"
    short = least - _budget(config, memory, step, kv_type).weights
    return f"no context fits, and the shortest one lacks {human_bytes(short)}"


def _least_weights(config: Dots1Config) -> int:
    """Bytes of the smallest possible file: every weight in the narrowest type."""
    bpw = min(kind.bpw for kind in TYPES.values())
    return int(_elements(config) * bpw / 8)


@lru_cache(maxsize=8)
def _elements(config: Dots1Config) -> int:
    return sum(spec.elements for spec in inventory(config))
