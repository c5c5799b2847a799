"""The placements worth comparing, and the best of them.

What every token reads goes to the GPUs first, then the KV cache, then routed experts. Where that
leaves a choice (ubatch, host memory, how many layers' KV cache is in RAM, whether a worker is worth
it), the placement is taken that is predicted to need the least time for a conversation's turn:
reading a quarter of the context, but at least 2,048 tokens, and answering with 512.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dots1_local.devices.hardware import CPU, Device, Hardware
from dots1_local.placement.footprint import fetches_weights, footprint, lacking, room_of
from dots1_local.placement.layout import Layout, Sizes, Wish, fill
from dots1_local.placement.llama_args import EXPERTS
from dots1_local.placement.memory import kv_bytes
from dots1_local.placement.placement import Placement
from dots1_local.placement.speed_model import SpeedModel, break_even, is_measured
from dots1_local.placement.steps import Graph

__all__ = ["Candidate", "Search", "reference_turn", "seconds_of_turn"]

_UBATCH, _UBATCHES = 512, (1024, 2048, 4096, 256, 128)
_LONG_UBATCH = 2048
_PROMPT, _ANSWER = 2048, 512
_LEAST_BATCH = 64  # that weights are fetched for, at the least
_MOST_ROWS = 512  # of what sequences write at once, for which that is raised
_STEPS = 4  # in which layers are moved between devices
_TRIES = 9  # at buffers and what lies beside them


def reference_turn(context: int) -> tuple[int, int]:
    """Tokens of the prompt and of the answer that placements are compared by."""
    answer = min(_ANSWER, context // 4)
    return min(max(_PROMPT, context // 4), context - answer), answer


def seconds_of_turn(model: SpeedModel, context: int) -> float:
    """Predicted seconds of the reference turn."""
    prompt, answer = reference_turn(context)
    return model.prefill(prompt) + answer * model.decode(prompt + answer // 2)


@dataclass(frozen=True)
class Candidate:
    """A placement, the bytes that RAM lacks for it, and seconds of the reference turn if known."""

    wish: Wish
    placement: Placement
    short: int
    seconds: float | None

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """The least is the best: what fits, then what is known to be fast, or lacks little RAM."""
        if self.seconds is None:
            return self.short > 0, True, max(0, self.short)
        return self.short > 0, False, self.seconds


class Search:
    """The search for one model and machine, and a context for each of so many sequences."""

    def __init__(
        self,
        graph: Graph,
        hardware: Hardware,
        context: int,
        threads: int,
        margin: int | None,
        sequences: int = 1,
    ) -> None:
        self._graph, self._hardware, self._margin = graph, hardware, margin
        gpus = [device.name for device in hardware.devices if not device.worker]
        self._measured = is_measured(hardware, gpus)
        # llama.cpp counts rows, and what is normalised by head has a row a head: with fewer it
        # would go to the GPU and back for every token that each sequence writes.
        rows = (sequences + 1) * graph.config.num_attention_heads
        self._least_batch = max(_LEAST_BATCH, min(rows, _MOST_ROWS))
        self._first = Placement(
            model=graph.gguf.files[0].name,
            model_bytes=graph.gguf.nbytes,
            blocks=graph.config.num_hidden_layers,
            context=context,
            sequences=sequences,
            kv_type="F16",
            flash_attention=True,
            ubatch=_UBATCH,
            threads=threads,
            host_memory="plain",
        )

    def best(self, kv_type: str) -> Candidate:
        """The best placement with KV caches of that type; one is always found."""
        first = replace(self._first, kv_type=kv_type)
        wishes = list(_wishes(self._hardware, first.blocks))
        best = _best(each for wish in wishes for each in self._candidates(wish, first))
        others = [replace(first, ubatch=n) for n in _UBATCHES if n < 2 * first.tokens]
        for other in others:
            best = _best([best, *self._candidates(best.wish, other, near=True)])
        if best.placement.host_memory == "pinned":
            repacked = replace(best.placement, host_memory="repacked")
            if self._fits(repacked, best.short):
                best = _best([best, self._timed(best.wish, repacked, best.short)])
        return best

    def keeps_kv(self, kv_type: str) -> bool:
        """Whether the GPUs have room for all of the KV cache beside what else every token reads.

        And for a ubatch that is worth fetching experts for. True where there are no GPUs.
        """
        first = replace(self._first, kv_type=kv_type, ubatch=_LONG_UBATCH)
        wishes = [wish for wish in _wishes(self._hardware, first.blocks) if wish.homes]
        sizes = self._sizes(first)
        found = (w for wish in wishes for w in _ways(sizes, wish, self._room(wish, first)))
        return not wishes or any(not way.moved for way in found)

    def least_short(self, kv_type: str) -> int:
        """Bytes that RAM lacks at the least, with the smallest buffers; 0 or less if it fits."""
        first = replace(self._first, kv_type=kv_type, ubatch=_UBATCHES[-1])
        wishes = _wishes(self._hardware, first.blocks)
        return min(lacks[CPU] for wish in wishes for _, _, lacks in self._placements(wish, first))

    def _sizes(self, first: Placement) -> Sizes:
        kv = kv_bytes(self._graph.config, first.tokens, first.kv_type)
        return Sizes.of(self._graph, kv // first.blocks)

    def _candidates(
        self, wish: Wish, first: Placement, *, near: bool = False
    ) -> Iterator[Candidate]:
        for way, placement, lacks in self._placements(wish, first, near=near):
            short = lacks[CPU]
            held = replace(placement, host_memory="mapped") if short > 0 else placement
            yield self._timed(way, held, short)

    def _placements(
        self, wish: Wish, first: Placement, *, near: bool = False
    ) -> Iterator[tuple[Wish, Placement, dict[str, int]]]:
        """The ways to fulfil a wish, their placements and what those lack, which is RAM at most.

        With `near` they are of the wish's own kind.
        """
        sizes, room = self._sizes(first), self._room(wish, first)
        ways = _ways(sizes, replace(wish, cpu_layers=0, bare_layers=0), room)
        for way in _nearest(ways, wish) if near else ways:
            placement, lacks = self._fill(sizes, way, first, room)
            if placement is not None:
                yield way, placement, lacks

    def _room(self, wish: Wish, first: Placement) -> dict[str, int]:
        """A first guess at what buffers leave of the devices."""
        names = (*wish.homes, *wish.stores, *wish.tails)
        layers = dict.fromkeys(names, 0) | dict.fromkeys(names[:1], first.blocks + 1)
        experts = ((EXPERTS, CPU),)
        rough = replace(self._with_devices(first, layers), overrides=experts if names else ())
        usage = footprint(self._graph.gguf, rough)
        buffer = max(each.compute + each.scratch for each in usage.values())
        return {name: self._room_of(name) - buffer for name in names}

    def _room_of(self, name: str) -> int:
        return room_of(self._hardware.device(name), self._margin)

    def _fill(
        self, sizes: Sizes, wish: Wish, first: Placement, room: Mapping[str, int]
    ) -> tuple[Placement | None, dict[str, int]]:
        """The placement that leaves room for the buffers it needs itself, and what it lacks."""
        taken: dict[str, int] = {}
        for _ in range(_TRIES):
            layout = fill(sizes, wish, room)
            if layout is None:
                wish = _moving_more(wish)
                continue
            placement = replace(
                self._with_devices(first, layout.layers), overrides=layout.overrides
            )
            usage = footprint(self._graph.gguf, placement)
            lacks = {name: used.total - self._room_of(name) for name, used in usage.items()}
            if (taken or not room) and all(lacks[name] <= 0 for name in room):
                return placement, lacks
            buffers = {name: usage[name].compute + usage[name].scratch for name in room}
            taken = {name: max(buffers[name], taken.get(name, 0)) for name in room}
            room = {name: self._room_of(name) - taken[name] for name in room}
        return None, {}

    def _with_devices(self, first: Placement, layers: Mapping[str, int]) -> Placement:
        fetching = any(fetches_weights(self._hardware.device(name)) for name in layers)
        workers = (self._hardware.device(name).worker for name in layers)
        return replace(
            first,
            layers=layers,
            host_memory="pinned" if fetching else "repacked",
            offload_min_batch=self._least_batch if fetching else None,
            workers=tuple(dict.fromkeys(worker for worker in workers if worker)),
        )

    def _timed(self, wish: Wish, placement: Placement, short: int) -> Candidate:
        model = SpeedModel(self._graph, self._hardware, placement)
        if not model.fetches:
            placement = replace(placement, offload_min_batch=None)
        if not (self._measured and is_measured(self._hardware, placement.devices)):
            return Candidate(wish, placement, short, None)
        if model.fetches:
            placement = self._fetching(placement, break_even(model), short)
            model = model.placed_as(placement)
        seconds = seconds_of_turn(model, placement.context)
        return Candidate(wish, placement, short, seconds)

    def _fetching(self, placement: Placement, least: int, short: int) -> Placement:
        """With weights fetched from so many tokens on; for whole ubatches if it only fits so.

        Buffers were chosen for that, and may be larger where nothing is fetched.
        """
        wanted = replace(placement, offload_min_batch=max(self._least_batch, least))
        if self._fits(wanted, short):
            return wanted
        return replace(placement, offload_min_batch=max(self._least_batch, placement.ubatch))

    def _fits(self, placement: Placement, short: int) -> bool:
        """Whether devices have room, and RAM lacks no more than `short` bytes."""
        lacks = lacking(self._graph, self._hardware, placement, self._margin)
        return all(lack <= (max(0, short) if name == CPU else 0) for name, lack in lacks.items())


def _best(candidates: Iterable[Candidate]) -> Candidate:
    return min(candidates, key=lambda candidate: candidate.rank)


def _wishes(hardware: Hardware, blocks: int) -> Iterator[Wish]:
    """Ways to use the devices: the GPUs, workers beside them, and none, which always works.

    A worker has experts that GPUs have no room for, or the last layers as a whole.
    """
    gpus = tuple(device.name for device in hardware.devices if not device.worker)
    if gpus:
        yield Wish(gpus)
    workers = sorted((device for device in hardware.devices if device.worker), key=_slowness)
    for count in range(1, len(workers) + 1):
        chosen = tuple(device.name for device in workers[:count])
        yield Wish(gpus, stores=chosen)
        for step in range(1, _STEPS + 1):
            yield Wish(gpus, tails=chosen, tail_layers=(blocks + 1) * step // _STEPS)
    yield Wish()


def _ways(sizes: Sizes, wish: Wish, room: Mapping[str, int]) -> list[Wish]:
    """How many layers to have in RAM, as a whole or in part; the likeliest way first.

    That is none; or the KV cache of so many that the GPUs have room for all other weights; or of
    fewer, and weights of some; or weights alone.
    """

    def least(start: int, fits: Callable[[int], bool]) -> int | None:
        counts = range(sizes.blocks + 2)
        place = bisect_left(counts, True, start, key=fits)
        return place if place < len(counts) else None

    if not wish.homes or fill(sizes, wish, room):
        return [wish]
    ways = []
    few = least(1, lambda n: fill(sizes, replace(wish, cpu_layers=n), room) is not None)
    if few is not None:
        full = least(few, lambda n: _lends_all(fill(sizes, replace(wish, cpu_layers=n), room)))
        full = min(full or sizes.blocks, sizes.blocks)
        steps = (few + (full - few) * step // _STEPS for step in range(_STEPS))
        ways += [replace(wish, cpu_layers=n) for n in dict.fromkeys((full, *steps))]
    bare = least(1, lambda n: fill(sizes, replace(wish, bare_layers=n), room) is not None)
    if bare is not None and bare <= sizes.blocks:
        ways.append(replace(wish, bare_layers=bare))
    return ways


def _moving_more(wish: Wish) -> Wish:
    """The wish with a layer more in RAM, of those that have some there."""
    bare, whole = bool(wish.bare_layers), bool(wish.cpu_layers)
    return replace(wish, bare_layers=wish.bare_layers + bare, cpu_layers=wish.cpu_layers + whole)


def _nearest(ways: Sequence[Wish], wish: Wish) -> list[Wish]:
    """Those that move the same of layers as `wish` does: the first, and that of the nearest count.

    Where that moves nothing, the others must not either: the KV cache comes before a longer ubatch.
    """
    alike = [way for way in ways if bool(way.bare_layers) == bool(wish.bare_layers)]
    if not wish.moved:
        return [way for way in alike if not way.moved]
    nearest = sorted(alike, key=lambda way: abs(way.moved - wish.moved))
    return list(dict.fromkeys((*alike[:1], *nearest[:1])))


def _lends_all(layout: Layout | None) -> bool:
    return layout is not None and layout.lent >= layout.cpu_layers


def _slowness(device: Device) -> float:
    return -device.speed.bandwidth if device.speed else 0.0
