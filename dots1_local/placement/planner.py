"""Deciding where a model lives and how it is run, on a machine that may be elsewhere.

What is short where a placement does not fit, and what would fit instead.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from dots1_local.devices.hardware import CPU, Hardware
from dots1_local.errors import UsageError
from dots1_local.files.gguf import GGUFFile
from dots1_local.ggml import KV_TYPES, TYPES
from dots1_local.placement.candidates import Search
from dots1_local.placement.footprint import lacking, limited, unattended
from dots1_local.placement.memory import kv_bytes
from dots1_local.placement.placement import MAX_CONTEXT, Placement, check_context, human_context
from dots1_local.placement.speed_model import UNMEASURED_DISK, SpeedModel, is_measured
from dots1_local.placement.steps import Graph
from dots1_local.sizes import human_bytes

__all__ = [
    "Shortfall",
    "place",
    "shortfall_of",
]


_USUAL_CONTEXT, _USUAL_SHARE = 16_384, 4096


def place(
    gguf: GGUFFile,
    hardware: Hardware,
    *,
    context: int | None = None,
    sequences: int = 1,
    kv_type: str | None = None,
    vram: int | None = None,
    ram: int | None = None,
    threads: int | None = None,
    margin: int | None = None,
) -> Placement:
    """The placement of a model on a machine; where it does not fit, one that reads the file.

    So many `sequences` of `context` tokens each share the KV cache. That is by default 16,384
    tokens for all of them, but 4,096 for each, or what the model was trained for. `kv_type` is by
    default F16 if all of the KV cache then fits the GPUs, or fits RAM where there are none, and
    Q8_0 else: precision is not lowered to have a few more experts on a GPU. `vram` and `ram` are
    bytes to plan with in place of what is free; `margin` bytes are left free on each GPU.

    Raises:
        GGUFError: no dots1 model, or one that lacks numbers or tensors.
        UsageError: no such KV type, or none that the GPUs can do; a context that is no context, or
            so many that llama.cpp cannot count them.
    """
    if kv_type is not None and kv_type.upper() not in KV_TYPES:
        raise UsageError(f"no KV cache is kept in {kv_type}; there are {', '.join(KV_TYPES)}")
    if context is not None and not 0 < context <= MAX_CONTEXT:
        raise UsageError(f"a context has 1 to {MAX_CONTEXT:,} tokens, not {context:,}")
    check_context(context or 1, sequences)
    graph, machine = Graph.read(gguf), limited(hardware, vram=vram, ram=ram)
    usual = max(_USUAL_CONTEXT // sequences, _USUAL_SHARE)
    tokens = context or min(usual, graph.config.max_position_embeddings)
    search = Search(graph, machine, tokens, threads or machine.cores, margin, sequences)
    if kv_type is not None:
        placement = search.best(kv_type.upper()).placement
        if unable := unattended(machine, placement):
            raise UsageError(unable)
        return placement
    if not search.keeps_kv("F16"):
        return search.best("Q8_0").placement
    precise = search.best("F16")
    return (search.best("Q8_0") if precise.short > 0 else precise).placement


_NARROWER = ("Q8_0", "Q5_1", "Q4_0")  # types of a KV cache, each smaller than the one before
_STEP = 1024  # tokens, in which contexts are tried


@dataclass(frozen=True)
class Shortfall:
    """What a device lacks, in bytes, and what would fit: a context, a KV type, a file (or 0).

    The context is that of each of so many `sequences`.

    `share_on_disk` of the weights in RAM would be read from `disk` (bytes a second) again and
    again, which leaves `decode` tokens a second; None where the machine has not been measured.
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
            known = "" if self.disk_measured else ", which is assumed"
            text += (
                f"; with {self.share_on_disk:.0%} of what RAM has to hold read from disk at "
                f"{human_bytes(self.disk)}/s{known}, it would write {self.decode:.2f} tok/s"
            )
        return text


def shortfall_of(
    graph: Graph, hardware: Hardware, placement: Placement, margin: int | None = None
) -> Shortfall | None:
    """What is short on a machine for a placement, which may be an edited one; None if nothing.

    What would fit is another placement's.
    """
    lacks = lacking(graph, hardware, placement, margin)
    device = max(lacks, key=lambda name: lacks[name])
    if lacks[device] <= 0:
        return None

    def short(context: int, kv_type: str) -> int:
        search = Search(graph, hardware, context, placement.threads, margin, placement.sequences)
        return search.least_short(kv_type)

    least = short(placement.context, placement.kv_type)
    model = None
    if is_measured(hardware, list(lacks)) and placement.host_memory == "mapped":
        model = SpeedModel(graph, hardware, placement)
    kv = kv_bytes(graph.config, placement.tokens, placement.kv_type)
    fitting = (
        kind
        for kind in _NARROWER
        if kv - kv_bytes(graph.config, placement.tokens, kind) >= max(1, least)
        and short(placement.context, kind) <= 0
    )
    return Shortfall(
        device=device,
        lacks=least if least > 0 and device == CPU else lacks[device],
        context=_fitting_context(placement, short),
        kv_type=next(fitting, None),
        file_bytes=_fitting_file(graph, placement.model_bytes - max(0, least)),
        share_on_disk=model.share_on_disk if model else None,
        decode=1 / model.decode(placement.context // 2) if model else None,
        disk=hardware.disk or UNMEASURED_DISK,
        disk_measured=hardware.disk is not None,
        sequences=placement.sequences,
    )


def _fitting_file(graph: Graph, nbytes: int) -> int:
    """So many bytes, or 0 where the narrowest types there are take more."""
    narrowest = min(kind.bpw for kind in TYPES.values()) / 8
    weights = sum(tensor.elements for tensor in graph.tensors.values())
    return nbytes if nbytes >= weights * narrowest else 0


def _fitting_context(placement: Placement, short: Callable[[int, str], int]) -> int | None:
    """The largest context that would fit, in whole steps; None if the first does not."""
    contexts = range((placement.context - 1) // _STEP * _STEP, 0, -_STEP)
    place = bisect_left(contexts, True, key=lambda n: short(n, placement.kv_type) <= 0)
    return contexts[place] if place < len(contexts) else None
