"""Predicted speed of a placement on a machine: seconds of the next token and of reading a prompt.

llama.cpp's scheduler runs one device after the other, so times add up. A matrix product takes the
longer of reading the weights and multiplying with them. Nodes and changes of the device add to
that. A long ubatch copies weights from RAM to a GPU; what does not fit RAM is read from disk.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from typing import Any

from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import CPU, LONG_ROW, Hardware, Rate
from dots1_local.ggml import TYPES, quant_type
from dots1_local.placement.footprint import REPACKED, Usage, fetching_gpu, footprint, shortfall
from dots1_local.placement.graph_memory import LLAMA_MIN_BATCH
from dots1_local.placement.model_graph import (
    MatrixProduct,
    ModelGraph,
    ModelOp,
    UbatchWork,
    count_work,
    is_routed,
    matrix_product,
)
from dots1_local.placement.placement import Placement

__all__ = [
    "UNMEASURED_DISK", "Forecast", "SpeedModel", "fewest_copying", "forecast", "is_measured",
    "reference_turn", "seconds_of_turn", "slowest_in_ram",
]  # fmt: skip

UNMEASURED_DISK = 1e9  # bytes a second at which a mapped file is read, if nobody has measured it

_USES, _DENSE_USES = 24, 256  # of each weight, in the measurement of the speed of prefill
_NORMS_BY_HEAD = ("attn_q_norm", "attn_k_norm")  # they have a row for each head and token
_MIN_FETCHING_BATCH = 64  # tokens; smaller ubatches never copy weights
_MAX_ROWS = 512  # limit to which rows of several sequences raise that
_NEVER = 1 << 20  # tokens; no ubatch is as long
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)
_PROMPT, _ANSWER = 2048, 512  # tokens of the reference turn and of the forecast's prompt
_CONTEXTS = (0, 1024, 4096, 8192, 16384, 32768)  # tokens, at which speeds are forecast


def is_measured(hardware: Hardware, devices: Sequence[str]) -> bool:
    """Whether the speeds of the CPU and of `devices` are known."""
    return all(hardware.device(name).speed for name in (*devices, CPU))


class SpeedModel:
    """Seconds that a placement takes; every device that it uses must have been measured.

    `fetches`: a GPU can copy weights, and there are weights in RAM to copy. `share_on_disk` is the
    share of the weights in RAM that does not fit RAM.
    """

    def __init__(self, graph: ModelGraph, hardware: Hardware, placement: Placement) -> None:
        self._graph, self._config, self._placement = graph, graph.config, placement
        used = {name: hardware.device(name).speed for name in (*placement.used_devices, CPU)}
        self._speeds = {name: speed for name, speed in used.items() if speed}
        self._devices = [placement.device_of(op.name) if op.name else "" for op in graph.ops]
        self._gpu = fetching_gpu(placement)
        self._works: dict[tuple[str | None, bool], UbatchWork] = {}
        self.fetches = self._gpu is not None and CPU in self._devices
        self.share_on_disk = self._find_share_on_disk(hardware)
        self._disk = hardware.disk or UNMEASURED_DISK

    def decode(self, n_past: int) -> float:
        """Seconds of the next token with `n_past` tokens in the KV cache."""
        return self._ubatch(1, n_past)

    def prefill(self, n_tokens: int, n_past: int = 0) -> float:
        """Seconds of reading `n_tokens` after `n_past`, ubatch by ubatch; the last has logits."""
        ubatch = self._placement.ubatch
        starts = range(0, n_tokens, ubatch)
        return sum(
            self._ubatch(min(ubatch, n_tokens - start), n_past + start, int(start == starts[-1]))
            for start in starts
        )

    def of_matrix(self, op: ModelOp, device: str, n_tokens: int) -> float:
        """Seconds that one matrix takes on `device` in a ubatch, without nodes and transfers."""
        gpu = self._fetching(n_tokens) if op.type not in self._kept else None
        return self._product(matrix_product(op, device, gpu), n_tokens)

    def placed_as(self, placement: Placement) -> "SpeedModel":
        """The model of a placement that only differs in `offload_min_batch` or `ubatch`."""
        other = copy(self)
        other._placement = placement
        return other

    def break_even(self) -> int:
        """The smallest ubatch, in tokens, for which copying weights to a GPU is faster."""

        def pays(n_tokens: int) -> bool:
            copying, in_place = self._work(self._gpu), self._work(None)
            return self._seconds(copying, n_tokens, 0, 1) < self._seconds(in_place, n_tokens, 0, 1)

        index = bisect_left(_BATCHES, True, key=pays)
        return _BATCHES[index] if index < len(_BATCHES) else _NEVER

    @property
    def _least(self) -> int:
        """The number of rows from which on the GPU copies weights."""
        return self._placement.offload_min_batch or LLAMA_MIN_BATCH

    @property
    def _kept(self) -> Sequence[str]:
        """The types that the GPU cannot copy."""
        return REPACKED if self._placement.host_memory == "repacked" else ()

    def _fetching(self, n_tokens: int) -> str | None:
        """The GPU that copies weights for so many tokens."""
        return self._gpu if n_tokens >= self._least else None

    def least_batch(self) -> int:
        """The fewest tokens, from which on copying weights to a GPU is allowed and faster."""
        return max(fewest_copying(self._config, self._placement.sequences), self.break_even())

    def _ubatch(self, n_tokens: int, n_past: int, n_logits: int = 1) -> float:
        gpu = self._gpu if n_tokens * self._config.num_attention_heads >= self._least else None
        # In a short ubatch, only norms by head have enough rows to be copied.
        work = self._work(gpu, only_norms=gpu is not None and not self._fetching(n_tokens))
        return self._seconds(work, n_tokens, n_past, n_logits)

    def _work(self, gpu: str | None, *, only_norms: bool = False) -> UbatchWork:
        """The work of a ubatch if `gpu` copies weights from RAM, or only those of norms by head."""
        key = gpu, only_norms
        if key not in self._works:
            placed, only = self._placement, _NORMS_BY_HEAD if only_norms else ()
            kv = [placed.device_of_layer(layer) for layer in range(placed.blocks)]
            self._works[key] = count_work(self._graph, self._devices, kv, gpu, self._kept, only)
        return self._works[key]

    def _seconds(self, work: UbatchWork, n_tokens: int, n_past: int, n_logits: int) -> float:
        seconds = sum(
            self._product(product, n_logits if product.for_logits else n_tokens) * count
            for product, count in work.products.items()
        )
        for (device, copied), layers in work.attention.items():
            seconds += layers * self._attention(device, copied, n_tokens, n_past)
        for device, count in work.nodes.items():
            seconds += count * self._speeds[device].node
        for device, count in work.splits.items():
            seconds += count * self._speeds[device].split
        for (device, floats, for_logits), count in work.crossings.items():
            speed, tokens = self._speeds[device], n_logits if for_logits else n_tokens
            seconds += count * 4 * floats * tokens / (speed.upload or speed.upload_pageable)
        return seconds

    def _product(self, product: MatrixProduct, n_tokens: int) -> float:
        """Seconds of a product with so many rows; 0 of them take no time."""
        speed, config = self._speeds[product.device], self._config
        used = config.num_experts_per_tok / config.n_routed_experts if product.routed else 1.0
        touched = 1 - (1 - used) ** n_tokens
        nbytes = product.nbytes * touched
        rates = speed.matmul
        if product.device == CPU and self._placement.host_memory == "repacked":
            rates = {**rates, **speed.repacked}
        rate = _rate(rates, product.type)
        once, products = product.weights * touched, product.weights * used * n_tokens
        ops = _operations(rate, once, products, product.columns, dense=not product.routed)
        seconds = max(nbytes / speed.bandwidth, ops)
        if product.fetched:
            pinned = self._placement.host_memory == "pinned"
            seconds += nbytes / (speed.upload if pinned else speed.upload_pageable)
        if product.in_ram:
            seconds += self.share_on_disk * nbytes / self._disk
        return seconds

    def _attention(self, device: str, copied: bool, n_tokens: int, n_past: int) -> float:
        """Seconds of one layer; each token attends to itself and to all tokens before it."""
        speed, config, placement = self._speeds[device], self._config, self._placement
        inner = config.num_attention_heads * config.head_dim
        cells = n_past + n_tokens
        nbytes = 2 * quant_type(placement.kv_type).row_bytes(inner) * cells
        products = 2 * inner * n_tokens * (n_past + (n_tokens + 1) / 2)
        rate = _rate(speed.attention, placement.kv_type)
        if not placement.flash_attention:  # scores in F32 are written and read twice
            nbytes += 4 * 4 * config.num_attention_heads * n_tokens * cells
        seconds = max(nbytes / speed.bandwidth, _operations(rate, 2 * inner * cells, products))
        return seconds + (nbytes / speed.upload_pageable if copied else 0.0)

    def _find_share_on_disk(self, hardware: Hardware) -> float:
        placement = self._placement
        if placement.host_memory != "mapped":
            return 0.0
        tensors = self._graph.tensors
        nbytes = sum(each.nbytes for each in tensors if placement.device_of(each.name) == CPU)
        short = shortfall(self._graph, hardware, placement)[CPU]
        return min(1.0, max(0.0, short / nbytes)) if nbytes else 0.0


def fewest_copying(config: Dots1Config, sequences: int) -> int:
    """The fewest tokens of a ubatch that may copy weights to a GPU.

    llama.cpp counts rows, and norms by head have a row for each head. A lower limit would make the
    GPU fetch these norms for every token that each sequence writes.
    """
    rows = (sequences + 1) * config.num_attention_heads
    return max(_MIN_FETCHING_BATCH, min(rows, _MAX_ROWS))


def slowest_in_ram(graph: ModelGraph, hardware: Hardware) -> list[int]:
    """The blocks by the time that a byte of their experts takes the CPU, the longest first.

    Blocks that take the same time, or an unknown one, are in the order of the model.
    """
    speed, config = hardware.cpu.speed, graph.config
    seconds, nbytes = [0.0] * config.num_hidden_layers, [0] * config.num_hidden_layers
    for op in graph.ops:
        if speed and is_routed(op.part):
            rate = _rate(speed.matmul, op.type)
            products = op.weights / rate.decode_of(op.columns) if rate else 0.0
            seconds[op.layer] += max(op.nbytes / speed.bandwidth, products)
            nbytes[op.layer] += op.nbytes
    pace = [round(a / b * 1e12, 3) if b else 0.0 for a, b in zip(seconds, nbytes, strict=True)]
    return sorted(range(config.num_hidden_layers), key=lambda block: -pace[block])


def _operations(
    rate: Rate | None,
    once: float,
    products: float,
    columns: int = LONG_ROW,
    *,
    dense: bool = False,
) -> float:
    """Seconds of `products` multiply-adds with `once` weights, each used by as many tokens.

    One use of each weight runs at the rate of decoding. Dozens, or hundreds if `dense`, run at the
    rate of prefill. Between them, time grows linearly.
    """
    if rate is None or not once:
        return 0.0
    uses, limit = (_DENSE_USES, rate.dense) if dense and rate.dense else (_USES, rate.prefill)
    first, last = 1 / rate.decode_of(columns), uses / limit
    further = max(0.0, last - first) / (uses - 1)
    return max(once * (first - further) + products * further, products / limit)


def _rate(rates: Mapping[str, Rate], kind: str) -> Rate | None:
    """The rate of a type, or of the measured type that is nearest in bits per weight."""
    if kind in rates or not rates:
        return rates.get(kind)
    known = [name for name in rates if name in TYPES]
    if not known or kind not in TYPES:
        return None
    return rates[min(known, key=lambda name: abs(TYPES[name].bpw - TYPES[kind].bpw))]


def reference_turn(context: int) -> tuple[int, int]:
    """Tokens of the prompt and of the answer in the turn that placements are compared by."""
    answer = min(_ANSWER, context // 4)
    return min(max(_PROMPT, context // 4), context - answer), answer


def seconds_of_turn(model: SpeedModel, context: int) -> float:
    """Predicted seconds of the reference turn."""
    prompt, answer = reference_turn(context)
    return model.prefill(prompt) + answer * model.decode(prompt + answer // 2)


@dataclass(frozen=True)
class SpeedAt:
    """Tokens a second after `context` tokens; 1,000 more tokens lower `decode` by `cost`."""

    context: int
    prefill: float
    decode: float
    cost: float


@dataclass(frozen=True)
class Forecast:
    """Bytes that devices hold and have free, and speeds (prefill of `prompt` tokens) if known."""

    usage: Mapping[str, Usage]
    free: Mapping[str, int]
    speeds: tuple[SpeedAt, ...]
    prompt: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, for scripts."""
        devices = {
            name: {**asdict(usage), "total": usage.total, "free": self.free[name]}
            for name, usage in self.usage.items()
        }
        speeds = [asdict(speed) for speed in self.speeds]
        return {"devices": devices, "prompt": self.prompt, "speeds": speeds}


def forecast(graph: ModelGraph, hardware: Hardware, placement: Placement) -> Forecast:
    """Predict the bytes and speeds of a placement, which may be an edited one."""
    usage = footprint(graph, placement)
    free = {name: hardware.device(name).free - used.total for name, used in usage.items()}
    prompt = min(_PROMPT, placement.context)
    if not is_measured(hardware, [name for name in usage if name != CPU]):
        return Forecast(usage, free, (), prompt)
    model = SpeedModel(graph, hardware, placement)
    last = placement.context - 1
    contexts = [*(n for n in _CONTEXTS if n < last), last]

    def speed_at(context: int) -> SpeedAt:
        before = max(0, context - prompt)
        decode, later = 1 / model.decode(context), 1 / model.decode(context + 1000)
        return SpeedAt(context, prompt / model.prefill(prompt, before), decode, decode - later)

    return Forecast(usage, free, tuple(map(speed_at, contexts)), prompt)
