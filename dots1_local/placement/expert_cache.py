"""What llama.cpp's cache of experts in VRAM would do in the place of experts that stay there.

llama-server --moe-cache-mib (b11480, 7 October 2026) keeps the experts that were used last of
layers whose experts all lie in RAM. The GPU computes them; experts that it lacks are uploaded
first. Layers of one GPU share slots if their experts have equal types and shapes, and each such
group gets the same share of its experts. The hit rates are those of a calibration's trace.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from dots1_local.calibrate.cache_hits import lru_hit_rates, stack_distances
from dots1_local.calibrate.routing import Routing
from dots1_local.devices.hardware import CPU, Hardware
from dots1_local.placement.footprint import footprint, usable_bytes
from dots1_local.placement.llama_args import EXPERTS, command_line, expert_overrides
from dots1_local.placement.model_graph import ModelGraph, is_routed
from dots1_local.placement.placement import Placement
from dots1_local.placement.speed_model import SpeedModel, is_measured, reference_turn
from dots1_local.sizes import human_bytes

__all__ = ["CacheForecast", "NoExpertCache", "decode_with_hits", "predict_cache"]

_MIB = 1 << 20
_REPLAYED = 8192  # tokens of the trace; a cache of a quarter of the experts is full after hundreds
_MARGIN = 1.05  # a cache must decode this much faster to be worth an option

HitRates = Mapping[int, float]  # by layer


class NoExpertCache(Exception):
    """Says in one clause why no cache can be predicted."""


@dataclass(frozen=True)
class CacheForecast:
    """A cache of `mib` MiB with `placement`, which has all routed experts in RAM.

    `hit_rate` is that of all layers with a cache, `layers` that of each. With the rate `needed` it
    would decode as fast as the placement that it replaces. Speeds are tokens a second, as planned
    and with the cache: `decode` in the middle of the reference turn, `prefill` of its prompt.
    """

    mib: int
    hit_rate: float
    needed: float
    decode: tuple[float, float]
    prefill: tuple[float, float]
    layers: HitRates
    placement: Placement

    @property
    def wins(self) -> bool:
        """Whether the cache decodes at least 5% faster."""
        return self.decode[1] >= _MARGIN * self.decode[0]

    def command(self, hardware: Hardware, model: str) -> str:
        """llama-server's command with the cache."""
        return f"{command_line(self.placement, hardware, model)} --moe-cache-mib {self.mib}"

    def to_json(self, hardware: Hardware, model: str) -> dict[str, Any]:
        """Plain values, for scripts."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content["placement"] = self.placement.to_json()
        return content | {"wins": self.wins, "command": self.command(hardware, model)}


def predict_cache(
    graph: ModelGraph, hardware: Hardware, placement: Placement, routing: Routing
) -> CacheForecast:
    """Predict a cache in the VRAM that a placement gives to routed experts.

    Raises:
        NoExpertCache: llama.cpp cannot cache experts here, or their speed is not known.
        Dots1Error: the routing is that of another model.
    """
    routing.check(graph.config)
    in_ram = _experts_in_ram(graph, placement)
    _require_room(graph, hardware, placement, in_ram)
    cached = [
        layer for layer in routing.layers if placement.device_of_layer(layer) != CPU
    ]  # the cache is on a layer's own device
    if not cached:
        raise NoExpertCache("no GPU holds a layer")
    shares = _shares(placement, cached)
    mib = _cache_mib(graph, placement, in_ram, shares)
    rates = _hit_rates(graph, placement, routing, cached, mib, shares)
    if not rates:
        raise NoExpertCache(f"{mib} MiB of VRAM are too few for the experts of one token")
    prompt, answer = reference_turn(placement.context)
    before, after = (SpeedModel(graph, hardware, each) for each in (placement, in_ram))
    n_past = prompt + answer // 2
    static, sizes = before.decode(n_past), _expert_bytes(graph, rates)
    none, found, full = (
        decode_with_hits(graph, hardware, in_ram, each, n_past)
        for each in (dict.fromkeys(rates, 0.0), rates, dict.fromkeys(rates, 1.0))
    )
    return CacheForecast(
        mib,
        sum(rates[n] * sizes[n] for n in rates) / sum(sizes.values()),
        (none - static) / (none - full),
        (1 / static, 1 / found),
        (prompt / before.prefill(prompt), prompt / after.prefill(prompt)),
        rates,
        in_ram,
    )


def decode_with_hits(
    graph: ModelGraph, hardware: Hardware, placement: Placement, rates: HitRates, n_past: int
) -> float:
    """Seconds of the next token if the layers in `rates` have a cache with these hit rates.

    `placement` has all routed experts in RAM. A GPU computes the experts of a layer with a cache as
    if it held them. Before that it waits for the choices of the router, which costs a split, and
    for the uploads of what it lacks.
    """
    config = graph.config
    rest = {
        n: {part.split("_")[1]: CPU for part in parts if is_routed(part)}
        for n, parts in enumerate(graph.layers)
        if n not in rates
    }
    others = [pair for pair in placement.overrides if pair != (EXPERTS, CPU)]
    layers = {n: parts for n, parts in rest.items() if parts}
    on_gpus = replace(placement, overrides=(*expert_overrides(layers), *others))
    seconds = SpeedModel(graph, hardware, on_gpus).decode(n_past)
    for layer, nbytes in _expert_bytes(graph, rates).items():
        speed = hardware.device(placement.device_of_layer(layer)).speed
        assert speed is not None
        upload = speed.upload if placement.host_memory == "pinned" else speed.upload_pageable
        missed = config.num_experts_per_tok * (1 - rates[layer])
        seconds += speed.split + missed * nbytes / upload
    return seconds


def _experts_in_ram(graph: ModelGraph, placement: Placement) -> Placement:
    """The placement with all routed experts in RAM, where a GPU can read them."""
    names = [tensor.name for tensor in graph.tensors if EXPERTS not in tensor.name]
    plain = replace(placement, overrides=((EXPERTS, CPU),))
    needed = [
        pair
        for pair in placement.overrides
        if any(
            replace(plain, overrides=(pair,)).device_of(name) != plain.device_of(name)
            for name in names
        )
    ]
    held = "pinned" if placement.host_memory == "repacked" else placement.host_memory
    return replace(plain, overrides=((EXPERTS, CPU), *needed), host_memory=held)


def _require_room(
    graph: ModelGraph, hardware: Hardware, placement: Placement, in_ram: Placement
) -> None:
    """Refuse what llama.cpp cannot cache, or what cannot be predicted."""
    where = {placement.device_of(each.name) for each in graph.tensors if EXPERTS in each.name}
    gpus = placement.used_devices
    if placement.workers:
        raise NoExpertCache("workers have no such cache")
    if where == {CPU} or not gpus:
        raise NoExpertCache("no GPU has room for routed experts")
    if CPU not in where:
        raise NoExpertCache("all experts are in VRAM")
    if not is_measured(hardware, gpus):
        raise NoExpertCache("the machine has not been measured")
    speeds = [hardware.device(name).speed for name in gpus]
    if not all(speed and speed.upload and speed.upload_pageable for speed in speeds):
        raise NoExpertCache("the speed of uploads has not been measured")
    short = footprint(graph, in_ram)[CPU].total - usable_bytes(hardware.cpu)
    if short > 0:
        raise NoExpertCache(f"RAM lacks {human_bytes(short)} for all routed experts")


def _shares(placement: Placement, cached: Iterable[int]) -> dict[str, float]:
    """The part of the cache that each GPU gets: llama.cpp divides it like the layers."""
    names = dict.fromkeys(placement.device_of_layer(layer) for layer in cached)
    total = sum(placement.layers[name] for name in names)
    return {name: placement.layers[name] / total for name in names}


def _cache_mib(
    graph: ModelGraph, placement: Placement, in_ram: Placement, shares: Mapping[str, float]
) -> int:
    """The largest cache that fits every GPU without more VRAM than the placement takes."""
    before, after = footprint(graph, placement), footprint(graph, in_ram)
    freed = {name: (before[name].total - after[name].total) / shares[name] for name in shares}
    least = min(freed, key=freed.__getitem__)
    if freed[least] < _MIB:
        raise NoExpertCache(f"{least} has no VRAM for its share of a cache")
    return int(freed[least] // _MIB)


def _hit_rates(
    graph: ModelGraph,
    placement: Placement,
    routing: Routing,
    cached: Sequence[int],
    mib: int,
    shares: Mapping[str, float],
) -> HitRates:
    """Hit rates by layer, of the layers that a cache of `mib` MiB has slots for."""
    sizes = _expert_bytes(graph, cached)
    groups: defaultdict[tuple[str, tuple[Any, ...]], list[int]] = defaultdict(list)
    per_device: defaultdict[str, int] = defaultdict(int)
    for layer in cached:
        device = placement.device_of_layer(layer)
        parts = graph.layers[layer].items()
        layout = tuple(sorted((p, t.type, t.shape) for p, t in parts if is_routed(p)))
        groups[device, layout].append(layer)
        per_device[device] += sizes[layer]
    rates: dict[int, float] = {}
    trace = routing.trace[:, :_REPLAYED]
    half = trace.shape[1] // 2
    for (device, _), layers in groups.items():
        each = sizes[layers[0]]
        budget = mib * _MIB * shares[device] * each * len(layers) / per_device[device]
        slots = min(int(budget // each) - 1, len(layers) * routing.experts)  # one stays empty
        if slots < routing.used:
            continue
        rows = np.array(layers) - routing.first_layer
        distances = stack_distances(trace[rows], routing.experts)[:, half:]
        found = lru_hit_rates(distances, np.array([slots]), routing.used)[:, 0]
        rates |= zip(layers, found.tolist(), strict=True)
    return dict(sorted(rates.items()))


def _expert_bytes(graph: ModelGraph, layers: Iterable[int]) -> dict[int, int]:
    """The bytes of one expert's matrices in each of these layers."""
    experts = graph.config.n_routed_experts
    return {
        layer: sum(t.nbytes for part, t in graph.layers[layer].items() if is_routed(part))
        // experts
        for layer in layers
    }
