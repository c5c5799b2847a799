"""The least predicted KL divergence that a machine can hold and run at a speed, and the front.

Types and the places of routed experts are chosen together, within the memory of every device and a
time (`quant.limits`). `place` then places the file as if it existed; where its buffers, or its way
to use a GPU, are others than assumed, the search is repeated with these.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from pathlib import Path

import numpy as np

from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import Hardware
from dots1_local.errors import UsageError
from dots1_local.files.gguf import GGUFTensor
from dots1_local.fit.costs import Costs, Turn
from dots1_local.fit.target import TANGENTS, Target, best_pick, choice_of_size, loss_of
from dots1_local.placement.footprint import shortfall
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import Placement
from dots1_local.placement.planner import place
from dots1_local.placement.speed_model import SpeedAt, SpeedModel, forecast
from dots1_local.progress import Progress, silent
from dots1_local.quant.allocation import plan_of
from dots1_local.quant.choices import KINDS, Choice, Choices
from dots1_local.quant.limits import LARGEST_SEARCH, Pick
from dots1_local.quant.plan import QuantPlan

__all__ = ["MachineFile", "Search", "graph_of"]

_ROUNDS = 4  # of placing a file and searching again with what that shows
_LENIENT = 1.15  # factor of a time that is tried if a time seems impossible
# Changes that are tried on the best file of a small model, and the least part of the KL divergence,
# or of the bytes, that they must save.
_CHANGES, _WORTH = 40, 0.01
# Kinds of placement are tried that are modelled to be at most this much worse, at first roughly.
_ROUGH, _PROMISING = 1.25, 1.02
_SIZES = 6  # of files whose placements show the kinds there are
_POINTS, _ALIKE = 12, 1.01  # of the front; two of them differ by more than this factor


@dataclass(frozen=True)
class MachineFile:
    """A plan for a file, its placement, and what is predicted: nats a token, bytes that each device
    lacks, and seconds of a token and of the turn."""

    plan: QuantPlan
    nbytes: int
    kl: float
    graph: ModelGraph
    hardware: Hardware
    placement: Placement
    lacks: Mapping[str, int]
    decode: float
    turn: float

    @property
    def speeds(self) -> tuple[SpeedAt, ...]:
        """Predicted speeds at several depths of context."""
        return forecast(self.graph, self.hardware, self.placement).speeds

    def decode_speeds(self, contexts: Sequence[int]) -> list[float]:
        """Tokens a second after so many tokens, or after the most that are predicted."""
        speeds = {each.context: each.decode for each in self.speeds}
        most = max(speeds, default=0)
        return [speeds.get(n, speeds[most]) for n in contexts if speeds]

    @property
    def short(self) -> int:
        """Bytes that the device with the least room lacks; 0 or less if the file fits."""
        return max(self.lacks.values())

    def dominates(self, other: "MachineFile") -> bool:
        """Whether it is no worse in anything that counts, and better in something."""
        ours, theirs = (self.kl, self.turn), (other.kl, other.turn)
        return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))

    def resembles(self, other: "MachineFile") -> bool:
        """Whether nobody would tell the two apart."""
        return self.kl < _ALIKE * other.kl and other.turn < _ALIKE * self.turn


def graph_of(config: Dots1Config, plan: QuantPlan, path: Path) -> ModelGraph:
    """The graph of a file that a plan describes, as if it existed at `path`."""
    tensors = [
        GGUFTensor(each.spec.name, each.kind.name, each.spec.shape, path, 0, each.nbytes)
        for each in plan.tensors(config)
    ]
    stored = replace(config, moe_intermediate_size=plan.expert_width)
    return ModelGraph.of(path, sum(each.nbytes for each in tensors), stored, tensors)


_FASTEST = Target(kl=math.inf)


class Search:
    """Searches files of one model for one machine and context.

    Raises:
        UsageError: the machine's speeds are unknown, or it has no room for the smallest file.
    """

    def __init__(
        self,
        config: Dots1Config,
        choices: Sequence[Choices],
        hardware: Hardware,
        context: int,
        *,
        path: Path = Path("model.gguf"),
        recipe: str = "",
        kv_type: str | None = None,
        progress: Progress = silent,
    ) -> None:
        self._config, self._choices, self.machine = config, choices, hardware
        self._context, self._path, self._kv_type = context, path, kv_type
        self._recipe, self._progress = recipe, progress
        self._kinds: dict[int, list[Costs]] = {}
        self._starts: dict[int, Choice] = {}
        self._found: list[MachineFile] = []
        self.turn = Turn.within(context)

    def best(self, target: Target) -> MachineFile | None:
        """The best file; None if no file was found that reaches the target."""
        for costs, pick in self._promising(target):
            self._found += self._near(costs, target, pick)
        best = self._best_found(target)
        if best is not None:  # `place` may know a better placement of it
            self._found.append(self.placed(best.plan, best.kl))
            best = self._best_found(target)
        while best is not None:
            self._found += self._changed(best, target)
            better = self._best_found(target)
            if better is best:
                break
            best = better
        return best

    def _best_found(self, target: Target) -> MachineFile | None:
        fitting = [each for each in self._found if self._reaches(each, target)]
        return min(fitting, key=lambda each: target.rank(each.kl, each.turn), default=None)

    def _changed(self, file: MachineFile, target: Target) -> Iterator[MachineFile]:
        """Files with other types for one tensor, or for two, those first that promise most."""
        [choices] = [each for each in self._choices if each.width == file.plan.expert_width]
        if len(choices.specs) > LARGEST_SEARCH:
            return  # its steps are small enough
        choice = np.array([KINDS.index(file.plan.types[s.name]) for s in choices.specs])
        aim = choices.tangent(choice) if target.kl is None else choices.nbytes
        present = np.take_along_axis(aim, choice[:, None], 1)
        gain, least = present - aim, _WORTH * float(present.sum())
        if target.kl is not None:
            least = -np.inf  # fewer bytes need not be faster
        moves = [(int(t), int(k)) for t, k in np.argwhere(np.isfinite(gain) & (gain != 0))]
        sets: list[tuple[tuple[int, int], ...]] = [(move,) for move in moves if gain[move] > least]
        both = (pair for pair in combinations(moves, 2) if pair[0][0] != pair[1][0])
        sets += [pair for pair in both if gain[pair[0]] + gain[pair[1]] > least]
        for changes in sorted(sets, key=lambda each: -sum(gain[move] for move in each))[:_CHANGES]:
            changed = choice.copy()
            for tensor, kind in changes:
                changed[tensor] = kind
            if target.kl is None or choices.kl(changed) <= target.kl:
                yield self._file(choices, changed)

    def front(self, nbytes: float | None = None) -> list[MachineFile]:
        """Files of which none is better than another in both KL divergence and the turn's time."""
        slow = self.best(Target(nbytes))
        if slow is None:
            return []
        fast = self.fastest(nbytes)
        found = [fast, slow]
        for seconds in np.geomspace(fast.turn, slow.turn, _POINTS)[1:-1]:
            self._progress(len(found), _POINTS, "files", f"a turn of {seconds:.0f} s")
            between = self.best(Target(nbytes, turn=float(seconds)))
            found += [between] if between else []
        front: list[MachineFile] = []
        for file in sorted(found, key=lambda each: (each.turn, each.kl)):
            if any(each.dominates(file) for each in found):
                continue
            if not front or not front[-1].resembles(file):
                front.append(file)
        return front

    def fastest(self, nbytes: float | None = None) -> MachineFile:
        """The file with the fastest turn, whatever its KL divergence.

        Raises:
            UsageError: the machine has no room for any file.
        """
        found = self.best(replace(_FASTEST, nbytes=nbytes))
        if found is None:
            raise UsageError(f"{self.machine.name} has no room for any file of this model")
        return found

    def placed(self, plan: QuantPlan, kl: float) -> MachineFile:
        """What a plan comes to on this machine."""
        graph = graph_of(self._config, plan, self._path)
        placement = place(graph, self.machine, context=self._context, kv_type=self._kv_type)
        return self._placed_as(graph, placement, plan, kl)

    def _placed_as(
        self, graph: ModelGraph, placement: Placement, plan: QuantPlan, kl: float
    ) -> MachineFile:
        model = SpeedModel(graph, self.machine, placement)
        if model.fetches:
            placement = replace(placement, offload_min_batch=model.least_batch())
            model = model.placed_as(placement)
        lacks = shortfall(graph, self.machine, placement)
        decode, turn = model.decode(self.turn.depth), self.turn.seconds(model)
        return MachineFile(
            plan, graph.nbytes, kl, graph, self.machine, placement, lacks, decode, turn
        )

    def _reaches(self, file: MachineFile, target: Target) -> bool:
        limits = (
            (file.short, 0),
            (file.nbytes, target.nbytes),
            (file.decode, target.decode),
            (file.turn, target.turn),
            (file.kl, target.kl),
        )
        return all(most is None or value <= most * (1 + 1e-9) for value, most in limits)

    def _kinds_of_placement(self, choices: Choices) -> list[Costs]:
        """Costs beside each kind of placement that files of this width get, by their size.

        Placements of a kind differ in which matrices of routed experts are in RAM.
        """
        if choices.width not in self._kinds:
            smallest, largest = choices.smallest(), choices.best()
            files = [self._file(choices, smallest)]
            low, high = choices.size(smallest), choices.size(largest)
            sizes = np.geomspace(low, high, _SIZES)[1:-1].tolist()
            between = [choice_of_size(choices, size) for size in sizes]
            files += [self._file(choices, choice) for choice in (*between, largest)]
            files = [each for each in files if each.short <= 0]
            kinds = [_kind(each.placement) for each in files]
            first = [f for n, f in enumerate(files) if kinds[n] not in kinds[:n]]
            self._kinds[choices.width] = [self._costs(choices, each) for each in first]
            self._found += files
            for costs in self._kinds[choices.width]:
                pick = self._modelled(costs, _FASTEST, self._start(costs, _FASTEST))
                if pick is not None:
                    self._found += self._near(costs, _FASTEST, pick)
            self._starts.clear()
        return self._kinds[choices.width]

    def _promising(self, target: Target) -> list[tuple[Costs, Pick]]:
        """The best choices beside those kinds of placement that are modelled to be good."""
        kinds = (self._kinds_of_placement(choices) for choices in self._choices)
        starts = [(costs, self._start(costs, target)) for costs in chain.from_iterable(kinds)]
        for tangents, factor in ((1, _ROUGH), (TANGENTS, _PROMISING)):
            found = [
                (costs, self._modelled(costs, target, start, tangents)) for costs, start in starts
            ]
            picks = [(costs, pick) for costs, pick in found if pick is not None]
            least = min((loss_of(costs, target, pick) for costs, pick in picks), default=0.0)
            picks = [each for each in picks if loss_of(each[0], target, each[1]) <= factor * least]
            starts = [(costs, pick.kind) for costs, pick in picks]
        return picks

    def _start(self, costs: Costs, target: Target) -> Choice:
        """The last choice beside a kind of placement, or else the best of those that fit."""
        if id(costs) not in self._starts:
            any_time, best = Target(target.nbytes), costs.choices.best()
            pick = best_pick(costs, best, any_time)
            self._starts[id(costs)] = best if pick is None else pick.kind
        return self._starts[id(costs)]

    def _modelled(
        self, costs: Costs, target: Target, start: Choice, tangents: int = TANGENTS
    ) -> Pick | None:
        """The best choice beside a kind of placement; None if nothing comes near the target."""
        for scale in (1.0, _LENIENT):  # what is known of other files may mislead
            pick = best_pick(costs, start, target, scale, tangents=tangents)
            if pick is not None:
                self._starts[id(costs)] = pick.kind
                return pick
        return None

    def _near(self, costs: Costs, target: Target, pick: Pick) -> Iterator[MachineFile]:
        """Files found one after the other; each is searched with what the one before showed."""
        choices, scale, lacking = costs.choices, 1.0, Counter[str]()
        known: set[bytes] = set()
        for _ in range(_ROUNDS):
            plan, kl = self._plan(choices, pick.kind), choices.kl(pick.kind)
            graph = graph_of(self._config, plan, self._path)
            picked = self._placed_as(graph, costs.placed_as(pick), plan, kl)
            yield picked
            if (key := pick.kind.tobytes() + pick.place.tobytes()) in known:
                return
            known.add(key)
            wanted, real = target.decode, picked.decode
            if target.turn is not None:
                wanted, real = target.turn, picked.turn
            if picked.short <= 0 and (wanted is None or 0.985 * wanted <= real <= wanted):
                return
            if wanted is not None:
                scale = min(max(scale * wanted / real, 1 / _LENIENT**4), _LENIENT**4)
            lacking.update({n: lack // 2 for n, lack in picked.lacks.items() if lack > 0})
            costs = self._costs(choices, picked)
            again = best_pick(costs, pick.kind, target, scale, lacking)
            if again is None:
                return
            pick = again

    def _costs(self, choices: Choices, file: MachineFile) -> Costs:
        return Costs(choices, file.graph, self.machine, file.placement, self.turn)

    def _file(self, choices: Choices, choice: Choice) -> MachineFile:
        return self.placed(self._plan(choices, choice), choices.kl(choice))

    def _plan(self, choices: Choices, choice: Choice) -> QuantPlan:
        return plan_of(self._config, choices, choice, self._recipe)


def _kind(placement: Placement) -> Placement:
    """The placement without what routed experts and the file decide."""
    kept = tuple(each for each in placement.overrides if "_exps" not in each[0])
    return replace(placement, overrides=kept, offload_min_batch=None, model_bytes=0)
