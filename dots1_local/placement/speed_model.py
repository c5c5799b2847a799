"""Predicted seconds of a placement on a machine: of one more token, and of reading a prompt.

The scheduler of llama.cpp runs one device after the other, so that times add up. A matrix product
takes its device the longer of reading the weights and of multiplying with them. Each node of the
graph and each change of the device costs a little more. Weights in RAM are fetched to a GPU where
a ubatch is long enough for that; what RAM does not hold of a mapped file is read from disk.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from dots1_local.devices.hardware import CPU, Hardware, Rate, Speed
from dots1_local.ggml import TYPES, quant_type
from dots1_local.placement.compute_buffer import REPACKED
from dots1_local.placement.footprint import fetches_weights, lacking
from dots1_local.placement.placement import Placement
from dots1_local.placement.steps import ATTENTION, HEAD, Graph, Step, is_routed

__all__ = ["ENGINE_MIN_BATCH", "UNMEASURED_DISK", "SpeedModel", "break_even", "is_measured"]

ENGINE_MIN_BATCH = 32  # from which llama.cpp fetches weights, where nothing else is said
UNMEASURED_DISK = 1e9  # bytes a second that a mapped file is read at, where nobody has measured it

_USES, _DENSE_USES = 24, 256  # of each weight, where the speeds of prefill are measured
_BY_HEAD = ("attn_q_norm", "attn_k_norm")  # each with a row a head and token
_NEVER = 1 << 20  # a ubatch that none reaches
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class _Product:
    """A matrix product: where, how much, whether of chosen experts, whether with weights in RAM."""

    device: str
    type: str
    nbytes: int
    weights: int
    routed: bool
    in_ram: bool
    fetched: bool


@dataclass(frozen=True)
class _Pass:
    """All of a ubatch's work but the head's, for ubatches that fetch weights or that do not.

    `attention` counts layers by the device they attend on and whether the KV cache is copied there,
    `crossings` by device and by the floats of a token that go to it or come from it.
    """

    products: Mapping[_Product, int]
    nodes: Mapping[str, int]
    splits: Mapping[str, int]
    crossings: Mapping[tuple[str, int], int]
    attention: Mapping[tuple[str, bool], int]


def is_measured(hardware: Hardware, devices: Sequence[str]) -> bool:
    """Whether the speeds of the CPU and of `devices` are known."""
    return all(hardware.device(name).speed for name in (*devices, CPU))


class SpeedModel:
    """What a placement takes, in seconds; every device that it uses must have been measured."""

    def __init__(self, graph: Graph, hardware: Hardware, placement: Placement) -> None:
        self._graph, self._placement = graph, placement
        self._config = graph.config
        self._speeds: dict[str, Speed] = {}
        for name in (*placement.used_devices, CPU):
            if speed := hardware.device(name).speed:
                self._speeds[name] = speed
        names = (step.name for step in graph.steps)
        self._devices = [placement.device_of(name) if name else "" for name in names]
        self._fetches_to = self._fetching_device(hardware)
        self._disk = hardware.disk or UNMEASURED_DISK
        self._missing = self._share_on_disk(hardware) if placement.host_memory == "mapped" else 0.0

    def decode(self, n_past: int) -> float:
        """Seconds of the next token, `n_past` being in the KV cache."""
        return self._ubatch(1, n_past) + self._head()

    def prefill(self, n_tokens: int, n_past: int = 0) -> float:
        """Seconds of reading `n_tokens` after `n_past`, ubatch by ubatch."""
        seconds, ubatch = self._head(), self._placement.ubatch
        for start in range(0, n_tokens, ubatch):
            seconds += self._ubatch(min(ubatch, n_tokens - start), n_past + start)
        return seconds

    def placed_as(self, placement: Placement) -> "SpeedModel":
        """The model of a placement that differs in `offload_min_batch` or `ubatch` alone."""
        other = copy(self)
        other._placement = placement
        return other

    def batch(self, n_tokens: int, fetching: bool) -> float:
        """Seconds of one ubatch, weights in RAM fetched to a GPU or used where they lie."""
        return self._seconds(self._fetching if fetching else self._in_place, n_tokens, 0)

    @property
    def fetches(self) -> bool:
        """Whether there is a GPU that would fetch weights, and weights in RAM that it could."""
        return self._fetches_to is not None and CPU in self._devices

    @property
    def share_on_disk(self) -> float:
        """The share of the weights in RAM that RAM has no room for."""
        return self._missing

    def _ubatch(self, n_tokens: int, n_past: int) -> float:
        least = self._placement.offload_min_batch or ENGINE_MIN_BATCH
        work = self._in_place
        if self._fetches_to and n_tokens * self._config.num_attention_heads >= least:
            work = self._fetching if n_tokens >= least else self._fetching_norms
        return self._seconds(work, n_tokens, n_past)

    def _seconds(self, work: _Pass, n_tokens: int, n_past: int) -> float:
        seconds = sum(
            self._product(product, n_tokens) * count for product, count in work.products.items()
        )
        for (device, copied), layers in work.attention.items():
            seconds += layers * self._attention(device, copied, n_tokens, n_past)
        for device, count in work.nodes.items():
            seconds += count * self._speeds[device].node
        for device, count in work.splits.items():
            seconds += count * self._speeds[device].split
        for (device, floats), count in work.crossings.items():
            speed = self._speeds[device]
            seconds += count * 4 * floats * n_tokens / (speed.upload or speed.upload_pageable)
        return seconds

    def _product(self, product: _Product, n_tokens: int) -> float:
        speed, config = self._speeds[product.device], self._config
        used = touched = 1.0
        if product.routed:
            used = config.num_experts_per_tok / config.n_routed_experts
            touched = 1 - (1 - used) ** n_tokens
        nbytes = product.nbytes * touched
        rates = speed.matmul
        if product.device == CPU and self._placement.host_memory == "repacked":
            rates = {**rates, **speed.repacked}
        rate = _rate(rates, product.type)
        weights, dense = product.weights, not product.routed
        ops = _operations(rate, weights * touched, weights * used * n_tokens, dense=dense)
        seconds = max(nbytes / speed.bandwidth, ops)
        if product.fetched:
            pinned = self._placement.host_memory == "pinned"
            seconds += nbytes / (speed.upload if pinned else speed.upload_pageable)
        if product.in_ram:
            seconds += self._missing * nbytes / self._disk
        return seconds

    def _attention(self, device: str, copied: bool, n_tokens: int, n_past: int) -> float:
        """One layer's; a token attends to itself and to all before it."""
        speed, config, placement = self._speeds[device], self._config, self._placement
        inner = config.num_attention_heads * config.head_dim
        cells = n_past + n_tokens
        nbytes = 2 * quant_type(placement.kv_type).row_bytes(inner) * cells
        products = 2 * inner * n_tokens * (n_past + (n_tokens + 1) / 2)
        rate = _rate(speed.attention, placement.kv_type)
        if not placement.flash_attention:  # scores in F32: written, read, written and read again
            nbytes += 4 * 4 * config.num_attention_heads * n_tokens * cells
        seconds = max(nbytes / speed.bandwidth, _operations(rate, 2 * inner * cells, products))
        return seconds + (nbytes / speed.upload_pageable if copied else 0.0)

    def _head(self) -> float:
        """The logits of one token; it is too little for fetching anything."""
        device, step = self._devices[-1], self._graph.steps[-1]
        head = _Product(device, step.type, step.nbytes, step.weights, False, device == CPU, False)
        return self._product(head, 1)

    @cached_property
    def _in_place(self) -> _Pass:
        return self._pass(None)

    @cached_property
    def _fetching(self) -> _Pass:
        return self._pass(self._fetches_to)

    @cached_property
    def _fetching_norms(self) -> _Pass:
        """That of ubatches in which only norms by head have rows enough to be fetched."""
        return self._pass(self._fetches_to, _BY_HEAD)

    def _pass(self, fetching: str | None, parts: Sequence[str] = ()) -> _Pass:
        """The work where `fetching` takes over what has weights in RAM, or but `parts` of that.

        It cannot read repacked weights; the head has too few rows.
        """
        repacked = REPACKED if self._placement.host_memory == "repacked" else ()
        products: Counter[_Product] = Counter()
        nodes: Counter[str] = Counter()
        attention: Counter[tuple[str, bool]] = Counter()
        runs: list[tuple[str, Step]] = []
        for place, (step, home) in enumerate(zip(self._graph.steps, self._devices, strict=True)):
            if step.part == ATTENTION:
                output, to = self._devices[place + 1], None if parts else fetching
                device, copied = self._attends_on(step, output, to)
                attention[device, copied] += 1
            else:
                in_ram = home == CPU
                moves = step.part in parts if parts else step.part != HEAD
                fetched = in_ram and moves and step.type not in repacked and fetching is not None
                device = fetching if fetched and fetching else home
                if step.weights and step.part != HEAD:
                    routed = is_routed(step.part)
                    products[
                        _Product(
                            device, step.type, step.nbytes, step.weights, routed, in_ram, fetched
                        )
                    ] += 1
            nodes[device] += step.nodes
            runs.append((device, step))
        splits, crossings = _changes(runs, self._config.hidden_size)
        if fetching is not None:  # each fetched matrix begins a split of its own
            splits[fetching] += sum(n for product, n in products.items() if product.fetched)
        return _Pass(products, nodes, splits, crossings, attention)

    def _attends_on(self, step: Step, output: str, fetching: str | None) -> tuple[str, bool]:
        """Where a layer attends, and whether its KV cache is copied there for that.

        A KV cache in RAM is used where `attn_output` is multiplied: on the CPU only if that is.
        """
        home = self._placement.device_of_layer(step.layer)
        if home != CPU:
            return home, False
        device = fetching if fetching and output == CPU else output
        return device, device != CPU

    def _fetching_device(self, hardware: Hardware) -> str | None:
        """The first GPU that fetches weights, which workers do not."""
        used = self._placement.used_devices
        return next((n for n in used if fetches_weights(hardware.device(n))), None)

    def _share_on_disk(self, hardware: Hardware) -> float:
        tensors, placement = self._graph.tensors.values(), self._placement
        nbytes = sum(each.nbytes for each in tensors if placement.device_of(each.name) == CPU)
        short = lacking(self._graph, hardware, placement)[CPU]
        return min(1.0, max(0.0, short / nbytes)) if nbytes else 0.0


def break_even(model: SpeedModel) -> int:
    """The least batch from which on fetching weights is faster than using them where they lie."""

    def pays(n_tokens: int) -> bool:
        return model.batch(n_tokens, True) < model.batch(n_tokens, False)

    place = bisect_left(_BATCHES, True, key=pays)
    return _BATCHES[place] if place < len(_BATCHES) else _NEVER


def _changes(
    runs: Sequence[tuple[str, Step]], hidden: int
) -> tuple[Counter[str], Counter[tuple[str, int]]]:
    """Splits by device, and what crosses between two of them by device and floats of a token.

    Experts' outputs are added up where they are, but those of the CPU where they go.
    """
    splits = Counter([CPU])  # the embedding's
    crossings: Counter[tuple[str, int]] = Counter()
    before, floats = CPU, hidden
    for device, group in groupby(runs, key=lambda run: run[0]):
        if device != before:
            splits[device] += 1
            crossings.update((name, floats) for name in (before, device) if name != CPU)
        step = list(group)[-1][1]
        before = device
        floats = hidden if device != CPU and step.part == "ffn_down_exps" else step.output
    return splits, crossings


def _operations(rate: Rate | None, once: float, products: float, *, dense: bool = False) -> float:
    """Seconds of `products` multiply-adds with `once` weights, each used by as many tokens.

    One use takes what decoding does, dozens or (`dense`) hundreds what prefill does; between them
    it is a line.
    """
    if rate is None or not once:
        return 0.0
    uses, limit = (_DENSE_USES, rate.dense) if dense and rate.dense else (_USES, rate.prefill)
    first, last = 1 / rate.decode, uses / limit
    further = max(0.0, last - first) / (uses - 1)
    return max(once * (first - further) + products * further, products / limit)


def _rate(rates: Mapping[str, Rate], kind: str) -> Rate | None:
    """The rate of a type, or of the measured one that is nearest in bits per weight."""
    if kind in rates or not rates:
        return rates.get(kind)
    known = [name for name in rates if name in TYPES]
    if not known or kind not in TYPES:
        return None
    return rates[min(known, key=lambda name: abs(TYPES[name].bpw - TYPES[kind].bpw))]
