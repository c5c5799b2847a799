"""How many bytes of weights fit a memory beside what else running the model needs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from dots1_local.architecture import Dots1Config, inventory
from dots1_local.devices.hardware import CPU, Device, Hardware
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.ggml import TYPES
from dots1_local.placement.footprint import (
    distinct_layers,
    kv_bytes,
    kv_cells,
    scratch_bytes,
    usable_bytes,
)
from dots1_local.placement.graph_memory import reserved_buffers
from dots1_local.placement.ubatch_graph import PlacedLayer, PlacedWeight, UbatchShape
from dots1_local.sizes import human_bytes, parse_size

__all__ = ["MemoryBudget", "compute_bytes", "parse_memory", "weights_budget"]

_DEVICE = re.compile(r"(?:([1-9]\d?)\s*x\s*)?(.+?)\s*(gpu|vram|ram)", re.IGNORECASE | re.ASCII)
_UBATCH = 512  # tokens, which leaves `place` the choice of a shorter or longer one
_WIDEST = 1.5  # the size of the largest routed matrix, relative to one of average bits per weight


@dataclass(frozen=True)
class MemoryBudget:
    """How free memory is divided, in bytes; `buffers` includes rests that are too small to use."""

    kv: int
    buffers: int
    reserve: int
    weights: int
    explanation: str


def parse_memory(text: str) -> Hardware:
    """Parse '24GB gpu + 64GB ram', '2x24GiB gpu + 128 GB ram' or '96GB ram' to a machine.

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
    devices = (Device(f"CUDA{n}", "CUDA", "a GPU", size, size) for n, size in enumerate(gpus))
    cpu = Device(CPU, "CPU", "RAM", ram, ram)
    return Hardware(text, "the command line", "", 1, cpu, tuple(devices))


def weights_budget(
    config: Dots1Config, machine: Hardware, n_ctx: int, kv_type: str = "f16"
) -> MemoryBudget:
    """Return how many bytes of weights fit a machine beside a context of `n_ctx` tokens.

    `place` fits a file of this size into the machine, because it leaves the same reserve free.

    Raises:
        UsageError: the KV type is unknown, or the context is longer than the model was trained for.
        Dots1Error: not even the narrowest types fit, or a device has no room for any weights.
    """
    if not 0 < n_ctx <= config.max_position_embeddings:
        raise UsageError(
            f"this model was trained for contexts of 1 to {config.max_position_embeddings} tokens, "
            f"not {n_ctx}"
        )
    devices = [device for device in (*machine.devices, machine.cpu) if device.free]
    budget = _budget(config, devices, n_ctx, kv_type)
    least = int(_elements(config) * min(kind.bpw for kind in TYPES.values() if kind.candidate) / 8)
    buffers = _buffers(config, devices, n_ctx, kv_type, least)
    for device, buffer in zip(devices, buffers, strict=True):
        if usable_bytes(device) <= buffer:
            raise Dots1Error(
                f"{_name(device)} of {human_bytes(device.free)} has no room for weights: "
                f"{human_bytes(device.free - usable_bytes(device))} are left free, and llama.cpp's "
                f"buffers take {human_bytes(buffer)}; leave it out or give more"
            )
    if budget.weights < least:
        raise Dots1Error(
            f"{budget.explanation}, which take at least {human_bytes(least)}; "
            + _way_out(config, devices, n_ctx, kv_type, least)
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
    tokens, cells = min(n_ubatch, n_ctx), kv_cells(n_ctx)
    ubatch = UbatchShape(tokens, min(n_outputs, tokens), 1, cells, kv_type.upper(), flash_attention)
    own, copied = PlacedWeight(device), PlacedWeight(CPU, fetched, fetched=True)
    parts: list[list[tuple[str, PlacedWeight]]] = [[] for _ in range(config.num_hidden_layers + 1)]
    for spec in inventory(config):
        if spec.role != "embedding":
            weight = copied if fetched and spec.role == "routed" else own
            parts[-1 if spec.layer is None else spec.layer].append((spec.part, weight))
    layers = distinct_layers([PlacedLayer(device, tuple(each)) for each in parts])
    return reserved_buffers(config, layers, ubatch, gpu=device if fetched else None)[device]


def _budget(
    config: Dots1Config, devices: Sequence[Device], n_ctx: int, kv_type: str
) -> MemoryBudget:
    kv = kv_bytes(config, n_ctx, kv_type)
    usable = sum(usable_bytes(device) for device in devices)
    reserve = sum(device.free for device in devices) - usable
    most = min(usable - kv, 2 * _elements(config))  # no model is larger than in BF16
    buffers = sum(_buffers(config, devices, n_ctx, kv_type, most))
    weights = usable - kv - buffers
    memory = " + ".join(f"{human_bytes(device.free)} {_name(device)}" for device in devices)
    explanation = (
        f"{memory} - {human_bytes(kv)} KV cache for {n_ctx:,} tokens ({kv_type.lower()}) - "
        f"{human_bytes(buffers)} buffers - {human_bytes(reserve)} left free = "
        f"{human_bytes(max(weights, 0))} for weights"
    )
    return MemoryBudget(kv, buffers, reserve, weights, explanation)


def _buffers(
    config: Dots1Config, devices: Sequence[Device], n_ctx: int, kv_type: str, weights: int
) -> list[int]:
    """Bytes of each device that hold no weights: compute buffers, scratch, and an unused rest.

    If some experts are not on GPUs, the first GPU has room for a matrix that it copies from RAM.
    The rest of a GPU is too small for one more matrix, that of a worker for one more layer's three.
    The size of a matrix follows from `weights`, which is at least what all weights take.
    """
    experts = config.n_routed_experts * config.hidden_size * config.moe_intermediate_size
    shared = any(device.worker or device.name == CPU for device in devices)
    matrix = int(_WIDEST * max(0, weights) * experts / _elements(config)) if shared else 0

    def buffer(device: Device) -> int:
        is_gpu = not device.worker and device.name != CPU
        name, fetched = "CUDA0" if is_gpu else device.name, matrix if device == devices[0] else 0
        nbytes = compute_bytes(
            config, n_ctx, device=name, fetched=fetched * is_gpu, kv_type=kv_type
        ) + scratch_bytes(config, name, _UBATCH)
        if device.name == CPU:
            return nbytes + 4 * config.vocab_size
        return nbytes + (matrix if is_gpu else 3 * matrix)

    return [buffer(device) for device in devices]


def _name(device: Device) -> str:
    return "ram" if device.name == CPU else "worker" if device.worker else "gpu"


def _way_out(
    config: Dots1Config, devices: Sequence[Device], n_ctx: int, kv_type: str, least: int
) -> str:
    """Name the longest context that fits, or say how much is missing for the shortest."""
    step = kv_cells(1)
    for cells in range(kv_cells(n_ctx) - step, 0, -step):
        if _budget(config, devices, cells, kv_type).weights >= least:
            return f"a context of {cells:,} tokens would fit"
    short = least - _budget(config, devices, step, kv_type).weights
    return f"no context fits, and the shortest one lacks {human_bytes(short)}"


@lru_cache(maxsize=8)
def _elements(config: Dots1Config) -> int:
    return sum(spec.elements for spec in inventory(config))
