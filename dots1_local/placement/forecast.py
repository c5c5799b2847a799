"""What follows from a placement on a machine: bytes by device and class, speeds by context."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dots1_local.devices.hardware import CPU, Hardware
from dots1_local.placement.footprint import Usage, footprint
from dots1_local.placement.placement import Placement
from dots1_local.placement.speed_model import SpeedModel, is_measured
from dots1_local.placement.steps import Graph

__all__ = ["Forecast", "SpeedAt", "forecast"]

_PROMPT = 2048  # tokens, of which the speed of reading is told
_CONTEXTS = (0, 1024, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class SpeedAt:
    """Tokens a second with `context` tokens before: of reading a prompt, and of answering.

    Each further 1,000 tokens cost an answer `cost` tokens a second.
    """

    context: int
    prefill: float
    decode: float
    cost: float


@dataclass(frozen=True)
class Forecast:
    """Bytes that devices hold and have `free` besides; speeds, none where nothing is measured.

    `prompt` is how many tokens the prompt has whose reading `prefill` is about.
    """

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


def forecast(graph: Graph, hardware: Hardware, placement: Placement) -> Forecast:
    """The forecast for a placement, which may be an edited one."""
    usage = footprint(graph.gguf, placement)
    free = {name: hardware.device(name).free - used.total for name, used in usage.items()}
    prompt = min(_PROMPT, placement.context)
    if not is_measured(hardware, [name for name in usage if name != CPU]):
        return Forecast(usage, free, (), prompt)
    model = SpeedModel(graph, hardware, placement)
    last = placement.context - 1
    contexts = [*(n for n in _CONTEXTS if n < last), last]
    speeds = tuple(_speed(model, context, prompt) for context in contexts)
    return Forecast(usage, free, speeds, prompt)


def _speed(model: SpeedModel, context: int, prompt: int) -> SpeedAt:
    before = max(0, context - prompt) if context else 0
    decode, later = 1 / model.decode(context), 1 / model.decode(context + 1000)
    return SpeedAt(context, prompt / model.prefill(prompt, before), decode, decode - later)
