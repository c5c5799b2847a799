"""Placements tried out one after the other, each beside what was predicted of it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dots1_local.devices.hardware import Hardware
from dots1_local.engine.measure import Depth, Trial, try_out
from dots1_local.engine.report import compare
from dots1_local.errors import Dots1Error
from dots1_local.placement.footprint import Usage, footprint
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import Placement
from dots1_local.placement.speed_model import SpeedModel, is_measured
from dots1_local.progress import Progress, silent

__all__ = ["Contender", "Outcome", "bench", "predicted_depths"]

Contender = tuple[str, Placement | None]  # None: what llama.cpp does by itself


@dataclass(frozen=True)
class Outcome:
    """What was predicted of a placement, where anything was, and what came of it or why nothing."""

    name: str
    placement: Placement | None
    predicted: tuple[Depth, ...]
    usage: Mapping[str, Usage]
    trial: Trial | None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for scripts."""
        trial = self.trial
        return {
            "name": self.name,
            "placement": self.placement.to_json() if self.placement else None,
            "predicted": [vars(depth) for depth in self.predicted],
            "measured": [vars(depth) for depth in trial.depths] if trial else [],
            "bytes": [vars(each) for each in compare(trial.taken, self.usage)] if trial else [],
            "driver_bytes": dict(trial.used) if trial else {},
            "load_seconds": trial.load_seconds if trial else None,
            "warnings": list(trial.warnings) if trial else [],
            "error": self.error,
        }


def bench(
    graph: ModelGraph,
    machine: Hardware,
    contenders: Iterable[Contender],
    depths: Sequence[int],
    progress: Progress = silent,
    *,
    threads: int | None = None,
) -> Iterator[Outcome]:
    """Try each contender in a process of its own; one that fails does not end the others.

    `threads` are for llama.cpp by itself, by default one a core; a placement has its own.
    """
    workers = [device.worker for device in machine.devices if device.worker]
    for name, placement in contenders:
        predicted: tuple[Depth, ...] = ()
        usage: Mapping[str, Usage] = {}
        trial, error = None, None
        try:
            if placement is not None:
                predicted = predicted_depths(graph, machine, placement, depths)
                usage = footprint(graph, placement)
            trial = try_out(
                graph.gguf.files[0],
                placement,
                depths,
                workers=workers,
                threads=threads,
                progress=progress,
            )
        except Dots1Error as failure:
            error = str(failure)
        yield Outcome(name, placement, predicted, usage, trial, error)


def predicted_depths(
    graph: ModelGraph, machine: Hardware, placement: Placement, depths: Sequence[int]
) -> tuple[Depth, ...]:
    """What `try_out` should measure; nothing where a device's speed is unknown."""
    if not is_measured(machine, placement.used_devices):
        return ()
    model = SpeedModel(graph, machine, placement)
    return tuple(
        Depth(end, (end - start) / model.prefill(end - start, start), 1 / model.decode(end))
        for start, end in pairwise((0, *depths))
    )
