"""Other placements than the planned one: what would fit, and what people make by hand."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from dots1_local.devices.hardware import CPU, Hardware
from dots1_local.ggml import TYPES
from dots1_local.placement.footprint import footprint, kv_bytes, shortfall, usable_bytes
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import Placement, human_context
from dots1_local.placement.planner import Search
from dots1_local.placement.speed_model import UNMEASURED_DISK, SpeedModel, is_measured
from dots1_local.sizes import human_bytes

__all__ = [
    "Shortfall", "all_on_cpu", "baselines", "experts_in_ram", "explain_shortfall", "with_ubatch",
]  # fmt: skip

_NARROWER = ("Q8_0", "Q5_1", "Q4_0")  # types of a KV cache, each smaller than the one before
_STEP = 1024  # tokens between the contexts that are tried
_EXPERTS = r"ffn_(up|down|gate)_exps"


@dataclass(frozen=True)
class Shortfall:
    """What a device lacks, in bytes, and what would fit: a context, a KV type, a file size (or 0).

    As it is, llama.cpp would read `share_on_disk` of the weights in RAM from `disk` (bytes/s) again
    and again, and write `decode` tokens a second; both are None on an unmeasured machine.
    """

    device: str
    lacks: int
    context: int | None
    kv_type: str | None
    file_bytes: int
    share_on_disk: float | None
    decode: float | None
    disk: float
    disk_measured: bool
    sequences: int = 1

    def __str__(self) -> str:
        where = "RAM" if self.device == CPU else self.device
        ways = []
        if self.context:
            ways += [f"a context of {human_context(self.context, self.sequences)} tokens"]
        ways += [f"a KV cache in {self.kv_type}"] if self.kv_type else []
        ways += [f"a file of at most {human_bytes(self.file_bytes)}"] if self.file_bytes else []
        text = f"it does not fit: {where} lacks {human_bytes(self.lacks)}"
        text += f"; {', or '.join(ways)} would fit" if ways else "; no file of this model would fit"
        if self.decode is not None and self.share_on_disk is not None:
            assumed = "" if self.disk_measured else " (assumed)"
            text += (
                f"; with {self.share_on_disk:.0%} of what RAM has to hold read from disk at "
                f"{human_bytes(self.disk)}/s{assumed}, it would write {self.decode:.2f} tok/s"
            )
        return text


def explain_shortfall(
    graph: ModelGraph, hardware: Hardware, placement: Placement
) -> Shortfall | None:
    """Say what a machine lacks for a placement, perhaps an edited one; None if it lacks nothing."""
    lacks = shortfall(graph, hardware, placement)
    device = max(lacks, key=lambda name: lacks[name])
    if lacks[device] <= 0:
        return None

    def short(context: int, kv_type: str) -> int:
        search = Search(graph, hardware, context, placement.threads, placement.sequences)
        return search.least_short(kv_type)

    least = short(placement.context, placement.kv_type)
    model = None
    if is_measured(hardware, list(lacks)) and placement.host_memory == "mapped":
        model = SpeedModel(graph, hardware, placement)
    kv = kv_bytes(graph.config, placement.tokens, placement.kv_type)
    kv_types = (
        kind
        for kind in _NARROWER
        if kv - kv_bytes(graph.config, placement.tokens, kind) >= max(1, least)
        and short(placement.context, kind) <= 0
    )
    contexts = range((placement.context - 1) // _STEP * _STEP, 0, -_STEP)
    index = bisect_left(contexts, True, key=lambda n: short(n, placement.kv_type) <= 0)
    file_bytes = placement.model_bytes - max(0, least)
    narrowest = min(kind.bpw for kind in TYPES.values() if kind.candidate) / 8
    weights = sum(tensor.elements for tensor in graph.tensors)
    return Shortfall(
        device=device,
        lacks=least if least > 0 and device == CPU else lacks[device],
        context=contexts[index] if index < len(contexts) else None,
        kv_type=next(kv_types, None),
        file_bytes=file_bytes if file_bytes >= weights * narrowest else 0,
        share_on_disk=model.share_on_disk if model else None,
        decode=1 / model.decode(placement.context // 2) if model else None,
        disk=hardware.disk or UNMEASURED_DISK,
        disk_measured=hardware.disk is not None,
        sequences=placement.sequences,
    )


def baselines(
    graph: ModelGraph, machine: Hardware, ours: Placement
) -> Iterator[tuple[str, Placement]]:
    """Placements by name that people make by hand with llama.cpp's flags, if they fit.

    They differ from `ours` in what lies where, and use no more than the machine's first device.
    """
    if machine.devices:
        device = machine.devices[0]
        yield "all routed experts in RAM", experts_in_ram(machine, ours, range(ours.blocks))
        by_count = [experts_in_ram(machine, ours, range(n)) for n in range(ours.blocks + 1)]
        count = _first_that_fits(graph, machine, by_count)
        if count:  # 0 would put everything on the device
            yield f"experts of the first {count} layers in RAM", by_count[count]
        no_layers = experts_in_ram(machine, ours, ())
        wholes = [
            replace(no_layers, layers={device.name: n}) for n in range(ours.blocks + 1, 0, -1)
        ]
        count = _first_that_fits(graph, machine, wholes)
        if count is not None:
            yield f"last {wholes[count].gpu_layers} layers whole on the device", wholes[count]
    if ours.layers:
        yield "all on the CPU", all_on_cpu(ours)


def all_on_cpu(ours: Placement) -> Placement:
    """The placement without any device."""
    return replace(
        ours, layers={}, overrides=(), workers=(), host_memory="repacked", offload_min_batch=None
    )


def experts_in_ram(machine: Hardware, ours: Placement, layers: Iterable[int]) -> Placement:
    """Everything on the machine's first device except routed experts of `layers` (--n-cpu-moe)."""
    device = machine.devices[0]
    workers = (device.worker,) if device.worker else ()
    return replace(
        ours,
        layers={device.name: ours.blocks + 1},
        overrides=tuple((rf"blk\.{layer}\.{_EXPERTS}", CPU) for layer in layers),
        workers=workers,
        host_memory="plain" if workers else "pinned",
        offload_min_batch=None,
    )


def _first_that_fits(
    graph: ModelGraph, machine: Hardware, placements: Sequence[Placement]
) -> int | None:
    """The index of the first placement that fits the first device; later ones need less."""
    device = machine.devices[0]
    for index, placement in enumerate(placements):
        if footprint(graph, placement)[device.name].total <= usable_bytes(device):
            return index
    return None


def with_ubatch(graph: ModelGraph, machine: Hardware, ours: Placement, ubatch: int) -> Placement:
    """The placement with another ubatch, and with as many experts on devices as then fit."""
    search = Search(graph, machine, ours.context, ours.threads, ours.sequences)
    planned = search.best(ours.kv_type, ubatch).placement
    return replace(ours, ubatch=ubatch, layers=planned.layers, overrides=planned.overrides)
