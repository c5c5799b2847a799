"""Filling devices: which has which layers, and which of the routed experts.

Bytes that every token reads come first: a layer's weights but for routed experts, and its KV cache.
Of the experts a token reads a few, so that they get what is left, early layers' first.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, combinations

from dots1_local.devices.hardware import CPU
from dots1_local.files.gguf import role_of
from dots1_local.placement.llama_args import (
    EXPERT_PARTS,
    bare_overrides,
    expert_overrides,
    lent_overrides,
)
from dots1_local.placement.steps import Graph

__all__ = ["Layout", "Sizes", "Wish", "fill"]

_BLOCK = re.compile(r"blk\.(\d{1,4})\.")


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model by layer, the last being the output; `kv` is a layer's KV cache.

    `always` is what every token reads, `output` the `attn_output` in it, `experts` the routed
    experts by part.
    """

    always: Sequence[int]
    output: Sequence[int]
    experts: Sequence[Mapping[str, int]]
    kv: int

    @classmethod
    def of(cls, graph: Graph, kv: int) -> "Sizes":
        """Those of a model, with KV caches of `kv` bytes a layer."""
        count = graph.config.num_hidden_layers + 1
        always, output = [0] * count, [0] * count
        experts: list[dict[str, int]] = [{} for _ in range(count)]
        for tensor in graph.tensors.values():
            block, role = _BLOCK.match(tensor.name), role_of(tensor.name)
            number = min(int(block[1]), count - 1) if block else count - 1
            part = tensor.name.rsplit(".", 2)[-2]
            if role == "embedding":
                continue
            if role == "routed":
                experts[number][part.removeprefix("ffn_").removesuffix("_exps")] = tensor.nbytes
            else:
                always[number] += tensor.nbytes
            if part == "attn_output":
                output[number] = tensor.nbytes
        return cls(always, output, experts, kv)

    def bare(self, count: int) -> "Sizes":
        """Those of a model whose first `count` layers are their KV cache alone."""
        if not count:
            return self
        always = [0] * count + list(self.always[count:])
        experts: list[Mapping[str, int]] = [{}] * count
        return replace(self, always=always, experts=[*experts, *self.experts[count:]])

    @property
    def blocks(self) -> int:
        return len(self.always) - 1

    @cached_property
    def needed(self) -> list[int]:
        """What layers need at the least, summed up to each."""
        kv = [*([self.kv] * self.blocks), 0]
        return [0, *accumulate(a + b for a, b in zip(self.always, kv, strict=True))]

    @cached_property
    def whole(self) -> list[int]:
        """What layers need with all their experts, summed up to each."""
        experts = [0, *accumulate(sum(parts.values()) for parts in self.experts)]
        return [a + b for a, b in zip(self.needed, experts, strict=True)]


@dataclass(frozen=True)
class Wish:
    """A way to use devices.

    The first `cpu_layers` have their KV cache in RAM. The `homes` share the layers after those, but
    for the last `tail_layers`, which `tails` have with all their experts. `stores` take experts
    that have no room elsewhere. Homes with room to spare have weights of the first layers too. Or,
    the other way round, the first `bare_layers` have their weights in RAM and their KV cache not.
    """

    homes: tuple[str, ...] = ()
    stores: tuple[str, ...] = ()
    tails: tuple[str, ...] = ()
    tail_layers: int = 0
    cpu_layers: int = 0
    bare_layers: int = 0

    @property
    def moved(self) -> int:
        """How many layers homes have no room for, as a whole or in part."""
        return self.cpu_layers + self.bare_layers


@dataclass(frozen=True)
class Layout:
    """Layers by device, and what is elsewhere: weights that are `lent` a device, and experts."""

    layers: Mapping[str, int]
    overrides: tuple[tuple[str, str], ...]
    cpu_layers: int
    lent: int


def fill(sizes: Sizes, wish: Wish, room: Mapping[str, int]) -> Layout | None:
    """Give devices as much as there is `room` for; None where the least does not fit."""
    if wish.moved > sizes.blocks + 1:
        return None
    left, sizes = dict(room), sizes.bare(wish.bare_layers)
    tails, end = _tails(sizes, wish, left)
    start = wish.cpu_layers if wish.homes else end
    counts = _divide(sizes, wish.homes, left, start, end)
    if counts is None:
        return None
    own = [CPU] * start
    for name, count in [*zip(wish.homes, counts, strict=True), *reversed(tails.items())]:
        own += [name] * count
    lent = _lend(sizes, wish, left)
    if wish.homes and (len(lent) < start or wish.bare_layers):
        left = dict.fromkeys(left, 0)  # router and shared experts lie in RAM
    overrides = (
        *bare_overrides(range(wish.bare_layers)),
        *lent_overrides(lent),
        *_experts(sizes, wish, own[:end], lent, left),
    )
    names = (*wish.homes, *wish.stores, *reversed(wish.tails))
    return Layout({name: own.count(name) for name in names}, overrides, start, len(lent))


def _tails(sizes: Sizes, wish: Wish, left: dict[str, int]) -> tuple[dict[str, int], int]:
    """How many of the last layers each tail has, the last one first, and where those begin."""
    end, counts = sizes.blocks + 1, {}
    least = max(sizes.blocks + 1 - wish.tail_layers, wish.cpu_layers)
    for name in wish.tails:
        stop = end
        while end > least and sizes.whole[stop] - sizes.whole[end - 1] <= left[name]:
            end -= 1
        counts[name] = stop - end
        left[name] -= sizes.whole[stop] - sizes.whole[end]
    return counts, end


def _divide(
    sizes: Sizes, homes: Sequence[str], left: dict[str, int], start: int, end: int
) -> list[int] | None:
    """Layers from `start` to `end` for each home; takes what they need off `left`.

    A home has as many layers as it can have whole, but never so few that the others could not
    have the least that the rest need.
    """
    needed, whole = sizes.needed, sizes.whole
    counts = []
    for place, home in enumerate(homes):
        later = sum(left[other] for other in homes[place + 1 :])
        stop = start
        while stop < end and (
            needed[end] - needed[stop] > later or whole[stop + 1] - whole[start] <= left[home]
        ):
            stop += 1
        if needed[stop] - needed[start] > left[home]:
            return None
        left[home] -= needed[stop] - needed[start]
        counts.append(stop - start)
        start = stop
    return counts if start == end else None


def _lend(sizes: Sizes, wish: Wish, left: dict[str, int]) -> dict[int, str]:
    """Weights of layers whose KV cache is in RAM, for homes that have room; late layers first."""
    lent: dict[int, str] = {}
    for layer in reversed(range(min(wish.cpu_layers, sizes.blocks))):
        nbytes = sizes.always[layer] - sizes.output[layer]
        home = next((name for name in wish.homes if left[name] >= nbytes), None)
        if home is None:
            break
        left[home] -= nbytes
        lent[layer] = home
    return dict(sorted(lent.items()))


def _experts(
    sizes: Sizes, wish: Wish, own: Sequence[str], lent: Mapping[int, str], left: dict[str, int]
) -> list[tuple[str, str]]:
    """Overrides of what experts are not on their layer's `own` device."""
    moved: dict[int, dict[str, str]] = {}
    full = False
    for layer, device in enumerate(own):
        homes = () if full else (lent.get(layer, device), *wish.homes)
        stores = () if full else wish.stores
        placed = _place_experts(sizes.experts[layer], homes, stores, left)
        full = full or CPU in placed.values()
        if away := {part: place for part, place in placed.items() if place != device}:
            moved[layer] = away
    return expert_overrides(moved)


def _place_experts(
    experts: Mapping[str, int], homes: Sequence[str], stores: Sequence[str], left: dict[str, int]
) -> dict[str, str]:
    """The device of each part of a layer's experts; what has no room elsewhere is the CPU's.

    Homes may share a layer's matrices; a store is too far away for that.
    """
    placed: dict[str, str] = {}
    rest = [part for part in EXPERT_PARTS if part in experts]
    for home in dict.fromkeys(home for home in homes if home != CPU):
        chosen = _largest(experts, rest, left[home])
        placed |= dict.fromkeys(chosen, home)
        left[home] -= sum(experts[part] for part in chosen)
        rest = [part for part in rest if part not in chosen]
    for store in stores:
        if rest and sum(experts[part] for part in rest) <= left[store]:
            placed |= dict.fromkeys(rest, store)
            left[store] -= sum(experts[part] for part in rest)
            rest = []
    return placed | dict.fromkeys(rest, CPU)


def _largest(experts: Mapping[str, int], parts: Sequence[str], room: int) -> Sequence[str]:
    """Those of `parts` that fill `room` best."""
    choices = [choice for n in range(len(parts) + 1) for choice in combinations(parts, n)]
    sizes = {choice: sum(experts[part] for part in choice) for choice in choices}
    return max((choice for choice in choices if sizes[choice] <= room), key=sizes.__getitem__)
