"""Splitting a model over devices: strategies, and filling the devices by one of them.

What every token reads comes first: a layer's weights except routed experts, and its KV cache. A
token reads only a few experts, so they get the memory that is left: first those whose bytes take
the CPU longest, early layers before late ones.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from dots1_local.devices.hardware import CPU, Hardware
from dots1_local.placement.llama_args import (
    EXPERT_PARTS,
    expert_overrides,
    gpu_weight_overrides,
    ram_weight_overrides,
)
from dots1_local.placement.model_graph import LayerSizes

__all__ = ["DeviceSplit", "SplitStrategy", "fill", "most_similar", "strategies", "variants"]

Bytes = dict[str, int]  # by device; functions subtract what they place from `left`
_VARIANTS = 4  # numbers of layers that are tried between the least and the most


@dataclass(frozen=True)
class SplitStrategy:
    """A way to use the devices.

    The first `cpu_kv_layers` have their KV cache in RAM. The `gpus` share the layers after them,
    except up to `worker_layers` of the last layers, which `layer_workers` hold with all their
    experts. `expert_workers` take routed experts that fit nowhere else. GPUs with memory to spare
    also hold weights of the first layers. The reverse is possible too: the first
    `ram_weight_layers` have their weights in RAM and their KV cache on a GPU.
    """

    gpus: tuple[str, ...] = ()
    expert_workers: tuple[str, ...] = ()
    layer_workers: tuple[str, ...] = ()
    worker_layers: int = 0
    cpu_kv_layers: int = 0
    ram_weight_layers: int = 0

    @property
    def ram_layers(self) -> int:
        """The number of layers whose KV cache or weights are in RAM by decision."""
        return self.cpu_kv_layers + self.ram_weight_layers

    def with_one_more_in_ram(self) -> "SplitStrategy":
        """One more layer in RAM, in each way in which this strategy already has layers there."""
        return replace(
            self,
            ram_weight_layers=self.ram_weight_layers + bool(self.ram_weight_layers),
            cpu_kv_layers=self.cpu_kv_layers + bool(self.cpu_kv_layers),
        )


@dataclass(frozen=True)
class DeviceSplit:
    """Layers by device, and overrides for everything that is not on its layer's device.

    `all_weights_on_gpus` includes layers whose KV cache is in RAM, but no experts.
    """

    layers: Mapping[str, int]
    overrides: tuple[tuple[str, str], ...]
    all_weights_on_gpus: bool


def strategies(hardware: Hardware, blocks: int) -> Iterator[SplitStrategy]:
    """Ways to use the devices: the GPUs, workers besides them, and the CPU, which always works."""
    gpus = tuple(device.name for device in hardware.devices if not device.worker)
    if gpus:
        yield SplitStrategy(gpus)
    workers = sorted(
        (device for device in hardware.devices if device.worker),
        key=lambda each: -each.speed.bandwidth if each.speed else 0.0,
    )
    for count in range(1, len(workers) + 1):
        chosen = tuple(device.name for device in workers[:count])
        yield SplitStrategy(gpus, expert_workers=chosen)
        for step in range(1, _VARIANTS + 1):
            layers = (blocks + 1) * step // _VARIANTS
            yield SplitStrategy(gpus, layer_workers=chosen, worker_layers=layers)
    yield SplitStrategy()


def variants(
    sizes: LayerSizes, strategy: SplitStrategy, room: Mapping[str, int]
) -> list[SplitStrategy]:
    """The strategy with different numbers of layers in RAM, the most promising first.

    If not everything except experts fits the GPUs, RAM holds the KV cache of enough layers for all
    other weights to fit, the KV cache of fewer layers and some of their weights, or weights only.
    """

    def filled(*, kv: int = 0, weights: int = 0) -> DeviceSplit | None:
        return fill(sizes, replace(strategy, cpu_kv_layers=kv, ram_weight_layers=weights), room)

    def has_all_weights(kv: int) -> bool:
        split = filled(kv=kv)
        return split is not None and split.all_weights_on_gpus

    def least(start: int, fits: Callable[[int], bool]) -> int | None:
        counts = range(sizes.blocks + 2)
        index = bisect_left(counts, True, start, key=fits)
        return index if index < len(counts) else None

    if not strategy.gpus or filled():
        return [strategy]
    found = []
    few = least(1, lambda n: filled(kv=n) is not None)
    if few is not None:
        full = least(few, has_all_weights)
        full = min(full or sizes.blocks, sizes.blocks)
        between = (few + (full - few) * step // _VARIANTS for step in range(_VARIANTS))
        found += [replace(strategy, cpu_kv_layers=n) for n in dict.fromkeys((full, *between))]
    weights = least(1, lambda n: filled(weights=n) is not None)
    if weights is not None and weights <= sizes.blocks:
        found.append(replace(strategy, ram_weight_layers=weights))
    return found


def most_similar(found: Sequence[SplitStrategy], strategy: SplitStrategy) -> list[SplitStrategy]:
    """The variants that keep the same kind of bytes in RAM: the first, and the nearest in number.

    A strategy without layers in RAM keeps it so: a KV cache on GPUs comes before a longer ubatch.
    """
    weights = bool(strategy.ram_weight_layers)
    alike = [each for each in found if bool(each.ram_weight_layers) == weights]
    if not strategy.ram_layers:
        return [each for each in alike if not each.ram_layers]
    nearest = sorted(alike, key=lambda each: abs(each.ram_layers - strategy.ram_layers))
    return list(dict.fromkeys((*alike[:1], *nearest[:1])))


def fill(sizes: LayerSizes, strategy: SplitStrategy, room: Mapping[str, int]) -> DeviceSplit | None:
    """Put as much on each device as its `room` (bytes) allows; None if not even layers fit."""
    if strategy.ram_layers > sizes.blocks + 1:
        return None
    left, sizes = dict(room), sizes.without_weights(strategy.ram_weight_layers)
    on_workers, end = _last_layers(sizes, strategy, left)
    start = strategy.cpu_kv_layers if strategy.gpus else end
    counts = _divide(sizes, strategy.gpus, left, start, end)
    if counts is None:
        return None
    devices = [CPU] * start
    for name, count in [*zip(strategy.gpus, counts, strict=True), *reversed(on_workers.items())]:
        devices += [name] * count
    weights = _weights_of_cpu_layers(sizes, strategy, left)
    if strategy.gpus and (len(weights) < start or strategy.ram_weight_layers):
        left = dict.fromkeys(left, 0)  # router and shared experts are in RAM, so experts are too
    overrides = (
        *ram_weight_overrides(range(strategy.ram_weight_layers)),
        *gpu_weight_overrides(weights),
        *_experts(sizes, strategy, devices[:end], weights, left),
    )
    names = (*strategy.gpus, *strategy.expert_workers, *reversed(strategy.layer_workers))
    layers = {name: devices.count(name) for name in names}
    return DeviceSplit(layers, overrides, len(weights) >= start)


def _last_layers(sizes: LayerSizes, strategy: SplitStrategy, left: Bytes) -> tuple[Bytes, int]:
    """The number of layers on each layer worker, the last layers first, and where these begin."""
    end, counts = sizes.blocks + 1, {}
    least = max(sizes.blocks + 1 - strategy.worker_layers, strategy.cpu_kv_layers)
    for name in strategy.layer_workers:
        stop = end
        while end > least and sizes.whole[stop] - sizes.whole[end - 1] <= left[name]:
            end -= 1
        counts[name] = stop - end
        left[name] -= sizes.whole[stop] - sizes.whole[end]
    return counts, end


def _divide(
    sizes: LayerSizes, gpus: Sequence[str], left: Bytes, start: int, end: int
) -> list[int] | None:
    """The number of layers from `start` to `end` on each GPU.

    Each GPU gets as many layers as fit with all their experts. It gets more if the GPUs after it
    could not hold the rest even without experts.
    """
    needed, whole = sizes.needed, sizes.whole
    counts = []
    for index, gpu in enumerate(gpus):
        later = sum(left[other] for other in gpus[index + 1 :])
        stop = start
        while stop < end and (
            needed[end] - needed[stop] > later or whole[stop + 1] - whole[start] <= left[gpu]
        ):
            stop += 1
        if needed[stop] - needed[start] > left[gpu]:
            return None
        left[gpu] -= needed[stop] - needed[start]
        counts.append(stop - start)
        start = stop
    return counts if start == end else None


def _weights_of_cpu_layers(
    sizes: LayerSizes, strategy: SplitStrategy, left: Bytes
) -> dict[int, str]:
    """GPUs that hold weights of layers whose KV cache is in RAM; late layers come first."""
    devices: dict[int, str] = {}
    for layer in reversed(range(min(strategy.cpu_kv_layers, sizes.blocks))):
        nbytes = sizes.always[layer] - sizes.output[layer]
        gpu = next((name for name in strategy.gpus if left[name] >= nbytes), None)
        if gpu is None:
            break
        left[gpu] -= nbytes
        devices[layer] = gpu
    return dict(sorted(devices.items()))


def _experts(
    sizes: LayerSizes,
    strategy: SplitStrategy,
    layer_devices: Sequence[str],
    weights: Mapping[int, str],
    left: Bytes,
) -> list[tuple[str, str]]:
    """Overrides for routed experts that are not on their layer's device."""
    moved: dict[int, dict[str, str]] = {}
    full = False
    for layer in sizes.order:
        if layer >= len(layer_devices):
            continue  # a worker has the whole layer
        device = layer_devices[layer]
        gpus = () if full else (weights.get(layer, device), *strategy.gpus)
        workers = () if full else strategy.expert_workers
        placed = _place_experts(sizes.experts[layer], gpus, workers, left)
        full = full or CPU in placed.values()
        if elsewhere := {part: name for part, name in placed.items() if name != device}:
            moved[layer] = elsewhere
    return expert_overrides(dict(sorted(moved.items())))


def _place_experts(
    experts: Mapping[str, int], gpus: Sequence[str], workers: Sequence[str], left: Bytes
) -> dict[str, str]:
    """The device of each part of a layer's experts; the CPU gets what fits nowhere else.

    GPUs may share the matrices of a layer. A worker is too far away for that.
    """
    placed: dict[str, str] = {}
    rest = [part for part in EXPERT_PARTS if part in experts]
    for device in dict.fromkeys(name for name in (*gpus, *workers) if name != CPU):
        choices = [part for n in range(len(rest) + 1) for part in combinations(rest, n)]
        sizes = {choice: sum(experts[part] for part in choice) for choice in choices}
        allowed = [c for c in choices if device not in workers or len(c) in (0, len(rest))]
        fitting = [choice for choice in allowed if sizes[choice] <= left[device]]
        chosen = max(fitting, key=sizes.__getitem__, default=())
        placed |= dict.fromkeys(chosen, device)
        left[device] -= sizes[chosen]
        rest = [part for part in rest if part not in chosen]
    return placed | dict.fromkeys(rest, CPU)
