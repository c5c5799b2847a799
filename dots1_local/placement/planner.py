"""Deciding where a model lives and how it is run, on this machine or on a described one.

What every token reads goes to the GPUs first, then the KV cache, then routed experts. The predicted
time of a turn decides the rest: the ubatch, how RAM holds weights, how many layers have their KV
cache in RAM, and which workers are used. In a turn, llama.cpp reads a quarter of the context, but
at least 2,048 tokens, and writes 512.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain

from dots1_local.devices.hardware import CPU, Hardware
from dots1_local.errors import UsageError
from dots1_local.files.gguf import GGUFFile
from dots1_local.files.names import unicode_name
from dots1_local.placement.footprint import (
    fetching_gpu,
    footprint,
    kv_bytes,
    kv_type_unsupported,
    limited,
    shortfall,
    usable_bytes,
)
from dots1_local.placement.layout import SplitStrategy, fill, most_similar, strategies, variants
from dots1_local.placement.llama_args import EXPERTS
from dots1_local.placement.model_graph import LayerSizes, ModelGraph
from dots1_local.placement.placement import MAX_CONTEXT, Placement, check_context, default_context
from dots1_local.placement.speed_model import (
    SpeedModel,
    fewest_copying,
    is_measured,
    seconds_of_turn,
    slowest_in_ram,
)

__all__ = ["Search", "place"]

_UBATCH, _OTHER_UBATCHES = 512, (1024, 2048, 4096, 256, 128)
_LONG_UBATCH = 2048  # tokens, for which copying experts to a GPU is worth it
_ATTEMPTS = 9  # to fit the buffers and what lies beside them


def place(
    model: GGUFFile | ModelGraph,
    hardware: Hardware,
    *,
    context: int | None = None,
    sequences: int = 1,
    kv_type: str | None = None,
    vram: int | None = None,
    ram: int | None = None,
    threads: int | None = None,
) -> Placement:
    """Return the best placement of a model on a machine.

    If the model does not fit, the placement maps the file and reads what does not fit from disk.
    `sequences` of `context` tokens (by default `default_context`) each share the KV cache.
    `kv_type` is by default F16 if the GPUs hold all of the KV cache then, or if RAM holds it and
    there are no GPUs; otherwise it is Q8_0. Precision is not lowered to put a few more experts on a
    GPU. `vram` and `ram` are bytes to plan with in place of what is free.

    Raises:
        GGUFError: the file is not a dots1 model, or it lacks keys or tensors.
        UsageError: the KV type is unknown or the GPUs cannot use it, or llama.cpp cannot make a
            context of this size.
    """
    if context is not None and not 0 < context <= MAX_CONTEXT:
        raise UsageError(f"a context has 1 to {MAX_CONTEXT:,} tokens, not {context:,}")
    check_context(context or 1, sequences)
    graph = model if isinstance(model, ModelGraph) else ModelGraph.read(model)
    machine = limited(hardware, vram=vram, ram=ram)
    tokens = context or default_context(graph.config.max_position_embeddings, sequences)
    search = Search(graph, machine, tokens, threads or machine.cores, sequences)
    if kv_type is not None:
        placement = search.best(kv_type.upper()).placement
        if unable := kv_type_unsupported(machine, placement):
            raise UsageError(unable)
        return placement
    if not search.keeps_kv("F16"):
        return search.best("Q8_0").placement
    precise = search.best("F16")
    return (search.best("Q8_0") if precise.short > 0 else precise).placement


@dataclass(frozen=True)
class Candidate:
    """A placement, the bytes that RAM lacks for it, and the seconds of the turn if known."""

    strategy: SplitStrategy
    placement: Placement
    short: int
    seconds: float | None

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """The lowest rank is best: first what fits, then what is fast or lacks the least RAM."""
        if self.seconds is None:
            return self.short > 0, True, max(0, self.short)
        return self.short > 0, False, self.seconds


class Search:
    """Searches placements of one model on one machine, for `sequences` of `context` tokens each."""

    def __init__(
        self, graph: ModelGraph, hardware: Hardware, context: int, threads: int, sequences: int
    ) -> None:
        self._graph, self._hardware = graph, hardware
        devices = (*hardware.devices, hardware.cpu)
        self._usable = {device.name: usable_bytes(device) for device in devices}
        gpus = [device.name for device in hardware.devices if not device.worker]
        self._measured = is_measured(hardware, gpus)
        self._order = slowest_in_ram(graph, hardware)
        self._min_batch = fewest_copying(graph.config, sequences)
        self._first = Placement(
            model=unicode_name(graph.path.name),
            model_bytes=graph.nbytes,
            blocks=graph.config.num_hidden_layers,
            context=context,
            sequences=sequences,
            kv_type="F16",
            flash_attention=True,
            ubatch=_UBATCH,
            threads=threads,
            host_memory="plain",
        )

    def best(self, kv_type: str, ubatch: int | None = None) -> Candidate:
        """The best candidate with this KV type, and this ubatch if given; there always is one."""
        first = replace(self._first, kv_type=kv_type, ubatch=ubatch or _UBATCH)
        found = strategies(self._hardware, first.blocks)
        best = _best(each for strategy in found for each in self._candidates(strategy, first))
        others = [n for n in _OTHER_UBATCHES if n < 2 * first.tokens and not ubatch]
        for other in (replace(first, ubatch=n) for n in others):
            best = _best([best, *self._candidates(best.strategy, other, similar=True)])
        if best.placement.host_memory == "pinned":
            repacked = replace(best.placement, host_memory="repacked")
            if self._fits(repacked, best.short):
                best = _best([best, self._timed(best.strategy, repacked, best.short)])
        return best

    def keeps_kv(self, kv_type: str) -> bool:
        """Whether the GPUs can hold all of the KV cache and everything else every token reads.

        The buffers of a ubatch that is worth copying experts for must fit too. True without GPUs.
        """
        first = replace(self._first, kv_type=kv_type, ubatch=_LONG_UBATCH)
        with_gpus = [each for each in strategies(self._hardware, first.blocks) if each.gpus]
        rooms = ((each, self._room(each, first)) for each in with_gpus)
        found = (variants(self._sizes(first), each, room) for each, room in rooms)
        return not with_gpus or any(not each.ram_layers for each in chain.from_iterable(found))

    def least_short(self, kv_type: str) -> int:
        """Bytes that RAM lacks at least, with the smallest buffers; 0 or less if it fits."""
        first = replace(self._first, kv_type=kv_type, ubatch=_OTHER_UBATCHES[-1])
        found = (self._placements(each, first) for each in strategies(self._hardware, first.blocks))
        return min(lacks[CPU] for _, _, lacks in chain.from_iterable(found))

    def _sizes(self, first: Placement) -> LayerSizes:
        kv = kv_bytes(self._graph.config, first.tokens, first.kv_type)
        return LayerSizes.of(self._graph, kv // first.blocks, self._order)

    def _candidates(
        self, strategy: SplitStrategy, first: Placement, *, similar: bool = False
    ) -> Iterator[Candidate]:
        for variant, placement, lacks in self._placements(strategy, first, similar=similar):
            short = lacks[CPU]
            held = replace(placement, host_memory="mapped") if short > 0 else placement
            yield self._timed(variant, held, short)

    def _placements(
        self, strategy: SplitStrategy, first: Placement, *, similar: bool = False
    ) -> Iterator[tuple[SplitStrategy, Placement, dict[str, int]]]:
        """Variants of a strategy with their placements and the bytes that each device lacks.

        Only RAM can lack any. `similar` variants have about as many layers in RAM as the strategy.
        """
        sizes, room = self._sizes(first), self._room(strategy, first)
        found = variants(sizes, replace(strategy, cpu_kv_layers=0, ram_weight_layers=0), room)
        for variant in most_similar(found, strategy) if similar else found:
            placement, lacks = self._fill(sizes, variant, first, room)
            if placement is not None:
                yield variant, placement, lacks

    def _room(self, strategy: SplitStrategy, first: Placement) -> dict[str, int]:
        """A first guess of the bytes that buffers leave for weights and KV cache, by device."""
        names = (*strategy.gpus, *strategy.expert_workers, *strategy.layer_workers)
        layers = dict.fromkeys(names, 0) | dict.fromkeys(names[:1], first.blocks + 1)
        experts = ((EXPERTS, CPU),)
        rough = replace(self._with_devices(first, layers), overrides=experts if names else ())
        buffer = max(usage.buffers for usage in footprint(self._graph, rough).values())
        return {name: self._usable[name] - buffer for name in names}

    def _fill(
        self, sizes: LayerSizes, strategy: SplitStrategy, first: Placement, room: Mapping[str, int]
    ) -> tuple[Placement | None, dict[str, int]]:
        """The placement that leaves room for its own buffers, and the bytes each device lacks."""
        taken: dict[str, int] = {}
        for _ in range(_ATTEMPTS):
            split = fill(sizes, strategy, room)
            if split is None:
                strategy = strategy.with_one_more_in_ram()
                continue
            placement = replace(self._with_devices(first, split.layers), overrides=split.overrides)
            usage = footprint(self._graph, placement)
            lacks = {name: used.total - self._usable[name] for name, used in usage.items()}
            if (taken or not room) and all(lacks[name] <= 0 for name in room):
                return placement, lacks
            taken = {name: max(usage[name].buffers, taken.get(name, 0)) for name in room}
            room = {name: self._usable[name] - taken[name] for name in room}
        return None, {}

    def _with_devices(self, first: Placement, layers: Mapping[str, int]) -> Placement:
        workers = (self._hardware.device(name).worker for name in layers)
        used = tuple(dict.fromkeys(worker for worker in workers if worker))
        placement = replace(first, layers=layers, workers=used, host_memory="repacked")
        if fetching_gpu(placement) is None:
            return placement
        return replace(placement, host_memory="pinned", offload_min_batch=self._min_batch)

    def _timed(self, strategy: SplitStrategy, placement: Placement, short: int) -> Candidate:
        model = SpeedModel(self._graph, self._hardware, placement)
        if not model.fetches:
            placement = replace(placement, offload_min_batch=None)
        if not (self._measured and is_measured(self._hardware, placement.used_devices)):
            return Candidate(strategy, placement, short, None)
        if model.fetches:
            placement = self._with_min_batch(placement, model.break_even(), short)
            model = model.placed_as(placement)
        seconds = seconds_of_turn(model, placement.context)
        return Candidate(strategy, placement, short, seconds)

    def _with_min_batch(self, placement: Placement, least: int, short: int) -> Placement:
        """Copy weights from `least` tokens on, or for whole ubatches if only that fits.

        The devices were filled for copying; buffers can be larger if nothing is copied.
        """
        wanted = replace(placement, offload_min_batch=max(self._min_batch, least))
        if self._fits(wanted, short):
            return wanted
        return replace(placement, offload_min_batch=max(self._min_batch, placement.ubatch))

    def _fits(self, placement: Placement, short: int) -> bool:
        """Whether the devices have room, and RAM lacks at most `short` bytes."""
        lacks = shortfall(self._graph, self._hardware, placement)
        return all(lack <= (max(0, short) if name == CPU else 0) for name, lack in lacks.items())


def _best(candidates: Iterable[Candidate]) -> Candidate:
    return min(candidates, key=lambda candidate: candidate.rank)
