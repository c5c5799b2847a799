"""What each type of each tensor costs on a machine: bytes of its devices, and seconds.

A placement says which devices there are and what they hold besides weights. Each matrix of routed
experts may be on its layer's device or in RAM; everything else is where that placement has it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dots1_local.devices.hardware import CPU, Hardware
from dots1_local.placement.footprint import footprint, usable_bytes
from dots1_local.placement.llama_args import EXPERTS, expert_overrides
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import Placement
from dots1_local.placement.speed_model import SpeedModel
from dots1_local.quant.choices import KINDS, Choices
from dots1_local.quant.limits import Pick

__all__ = ["Costs", "Turn"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Turn:
    """Tokens of the turn whose time counts."""

    prompt: int
    answer: int

    @classmethod
    def within(cls, context: int) -> "Turn":
        """A prompt of 2,048 tokens and an answer of 512, or what the context has room for."""
        answer = min(512, context // 4)
        return cls(min(2048, context - answer), answer)

    @property
    def depth(self) -> int:
        """Tokens before the middle of the answer, where decoding is timed."""
        return self.prompt + self.answer // 2

    def prefill(self, seconds: float, decode: float) -> float:
        """Tokens a second of reading the prompt, in a turn of so many seconds with `decode` each
        for the tokens of the answer."""
        return self.prompt / (seconds - self.answer * decode)

    def seconds(self, model: SpeedModel) -> float:
        """Predicted seconds of the turn."""
        return model.prefill(self.prompt) + self.answer * model.decode(self.depth)


class Costs:
    """Costs at one expert width on one machine, beside what `placement` says for a similar file.

    Arrays are (places, tensors, types), with the tensors of `choices.specs`. The places are a
    layer's device and RAM; there is one place if nothing but RAM can hold experts.
    """

    def __init__(
        self,
        choices: Choices,
        graph: ModelGraph,
        hardware: Hardware,
        placement: Placement,
        turn: Turn,
    ) -> None:
        self.choices, self.turn, self.placement = choices, turn, placement
        self.devices = (*placement.used_devices, CPU)
        kept = tuple(each for each in placement.overrides if "_exps" not in each[0])
        home = replace(placement, overrides=kept)
        places = [home]
        self._routed = np.array([spec.role == "routed" for spec in choices.specs])
        if any(home.device_of(spec.name) != CPU for spec in choices.specs if spec.role == "routed"):
            places.append(replace(placement, overrides=((EXPERTS, CPU), *kept)))
        self._models = [SpeedModel(graph, hardware, each) for each in places]
        names = [[each.device_of(spec.name) for spec in choices.specs] for each in places]
        self.kept_overrides, self.homes = kept, names[0]
        self.room = self._find_room(graph, hardware, placement, home)
        self.nbytes = self._find_bytes(names)
        self.possible = np.isfinite(choices.nbytes) & np.stack(
            [np.ones((len(self._routed), 1), bool), self._routed[:, None]][: len(places)]
        )
        ops = {op.name: op for op in graph.ops}
        self._ops = [ops.get(spec.name) for spec in choices.specs]
        present = {tensor.name: KINDS.index(tensor.type) for tensor in graph.tensors}
        self._present = np.array([present[spec.name] for spec in choices.specs])
        self.decode = self._seconds(names, {1: 1})
        sizes = Counter(
            min(placement.ubatch, turn.prompt - start)
            for start in range(0, turn.prompt, placement.ubatch)
        )
        self.whole_turn = self._seconds(names, sizes) + turn.answer * self.decode
        self.fixed_decode = self._complete(lambda model: model.decode(turn.depth), self.decode)
        self.fixed_turn = self._complete(turn.seconds, self.whole_turn)

    def seconds(self, pick: Pick) -> float:
        """Seconds of the turn."""
        rows = np.arange(len(pick.kind))
        return self.fixed_turn + float(self.whole_turn[pick.place, rows, pick.kind].sum())

    def placed_as(self, pick: Pick) -> Placement:
        """The placement with each matrix of routed experts where `pick` has it."""
        moved: dict[int, dict[str, str]] = {}
        for row, (spec, home) in enumerate(zip(self.choices.specs, self.homes, strict=True)):
            if pick.place[row] and spec.layer is not None and home != CPU:
                moved.setdefault(spec.layer, {})[spec.part.split("_")[1]] = CPU
        overrides = (*expert_overrides(moved), *self.kept_overrides)
        return replace(self.placement, overrides=overrides)

    def _find_room(
        self, graph: ModelGraph, hardware: Hardware, placement: Placement, home: Placement
    ) -> Floats:
        """Bytes of each device for the tensors that have a choice."""
        usage, free = footprint(graph, placement), {spec.name for spec in self.choices.specs}
        room = {
            name: usable_bytes(hardware.device(name)) - usage[name].kv - usage[name].buffers
            for name in self.devices
        }
        for tensor in graph.tensors:
            if tensor.name not in free:
                room[home.device_of(tensor.name)] -= tensor.nbytes
        return np.array([room[name] for name in self.devices], np.float64)

    def _find_bytes(self, names: Sequence[Sequence[str]]) -> Floats:
        """Bytes, (devices, places, tensors, types)."""
        nbytes = np.nan_to_num(self.choices.nbytes, posinf=0.0)
        is_on = np.array([[[n == device for n in row] for row in names] for device in self.devices])
        found: Floats = is_on[..., None] * nbytes
        return found

    def _seconds(self, names: Sequence[Sequence[str]], sizes: Mapping[int, int]) -> Floats:
        """Seconds of so many ubatches by their size."""
        found = np.zeros((len(names), *self.choices.nbytes.shape))
        known: dict[tuple[object, ...], Floats] = {}
        for place, devices in enumerate(names):
            for row, (op, device) in enumerate(zip(self._ops, devices, strict=True)):
                if op is None or not self.possible[place, row].any():
                    continue  # the embedding, of which a token reads a row
                kinds = np.flatnonzero(self.possible[place, row])
                key = op.part, op.weights, device, kinds.tobytes()
                if key not in known:
                    known[key] = np.array(
                        [self._of_matrix(place, row, int(kind), device, sizes) for kind in kinds]
                    )
                found[place, row, kinds] = known[key]
        return found

    def _of_matrix(
        self, place: int, row: int, kind: int, device: str, sizes: Mapping[int, int]
    ) -> float:
        """Seconds of so many ubatches by their size that a matrix takes on a device."""
        op, model = self._ops[row], self._models[place]
        assert op is not None
        stored = replace(op, type=KINDS[kind], nbytes=int(self.choices.nbytes[row, kind]))
        rows = {1: 1} if op.for_logits else sizes
        return sum(count * model.of_matrix(stored, device, n) for n, count in rows.items())

    def _complete(self, seconds: Callable[[SpeedModel], float], matrices: Floats) -> float:
        """Add to `matrices` what experts in RAM cost besides, and return the rest."""
        rows = np.arange(len(self._present))
        at_home, *away = (seconds(model) for model in self._models)
        fixed = at_home - float(matrices[0, rows, self._present].sum())
        if away:
            place = self._routed.astype(np.intp)
            moved = away[0] - float(matrices[place, rows, self._present].sum())
            matrices[1, self._routed] += (moved - fixed) / self._routed.sum()
        return fixed
