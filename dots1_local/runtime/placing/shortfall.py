"""What is short where a placement does not fit, and what would fit instead."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from dots1_local.quant.types import TYPES
from dots1_local.runtime.devices.hardware import CPU, Hardware
from dots1_local.runtime.placing.candidates import Search
from dots1_local.runtime.placing.memory import kv_bytes
from dots1_local.runtime.placing.placement import Placement, human_context
from dots1_local.runtime.placing.room import lacking
from dots1_local.runtime.placing.speed_model import UNMEASURED_DISK, SpeedModel, is_measured
from dots1_local.runtime.placing.steps import Graph
from dots1_local.sizes import human_bytes

__all__ = ["Shortfall", "shortfall_of"]

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
