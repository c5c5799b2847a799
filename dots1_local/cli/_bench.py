"""`dots1 bench`: measure a model's speed, beside the prediction and other placements."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dots1_local.cli import _options as shared
from dots1_local.cli._model import local_model
from dots1_local.cli._options import option, verb
from dots1_local.cli._output import notice, print_json, print_table, progress_bar
from dots1_local.errors import UsageError
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from dots1_local.devices.hardware import Hardware
    from dots1_local.engine.measure import BenchResult, Depth
    from dots1_local.placement.model_graph import ModelGraph
    from dots1_local.placement.placement import Placement

__all__ = ["BenchOptions", "bench"]

_MARGIN = 256  # tokens that are generated after the deepest context


@dataclass(frozen=True, eq=False, repr=False)
class BenchOptions:
    model: shared.Model
    context: str = option(
        "Measure after these numbers of tokens.", "--context", "-c", value="512,4096"
    )
    ubatch: str | None = option("Try our placement with these ubatches too, such as 512,2048.")
    plan: list[Path] | None = option(
        "Try this file of dots1 plan --json instead of our placement; repeatable."
    )
    alternatives: bool = option(
        "Try other placements too.", "--alternatives/--no-alternatives", value=True
    )
    kv: shared.KVType = None
    vram: shared.Vram = None
    ram: shared.Ram = None
    worker: shared.Workers = None
    threads: shared.Threads = None
    json: shared.Json = False


@verb
def bench(options: BenchOptions) -> None:
    """Measure prefill and decode of our placement, beside the prediction and other placements.

    dots1 bench dots1-DQ4.gguf --context 512,4096,16k

    dots1 bench dots1-DQ4.gguf --plan plan.json --no-alternatives --json
    """
    from dots1_local.devices.machine import this_machine
    from dots1_local.engine.measure import bench as run
    from dots1_local.files.gguf import GGUFFile
    from dots1_local.placement.footprint import limited
    from dots1_local.placement.model_graph import ModelGraph
    from dots1_local.placement.placement import load_placement
    from dots1_local.placement.planner import place
    from dots1_local.verify.correct import corrected

    depths = _numbers(options.context, "--context")
    ubatches = [] if options.ubatch is None else _numbers(options.ubatch, "--ubatch")
    plans = [(path.name, load_placement(path)) for path in options.plan or ()]
    workers = _choose_workers([placement for _, placement in plans], options.worker or [])
    limits, threads = shared.memory_limits(options.vram, options.ram), options.threads
    gguf = corrected(GGUFFile.open(local_model(options.model, outlook=True)))
    graph = ModelGraph.read(gguf)
    with progress_bar("looking at this machine") as report:
        machine = limited(this_machine(workers, progress=report), **limits)
    tokens = depths[-1] + _MARGIN
    ours = plans or [
        ("ours", place(gguf, machine, context=tokens, kv_type=options.kv, threads=threads))
    ]
    alternatives = options.alternatives and not plans
    placements = list(_placements(graph, machine, ours, ubatches, alternatives))
    results: list[BenchResult] = []
    for number, (name, placement) in enumerate(placements, 1):
        with progress_bar(f"{name} ({number} of {len(placements)})") as report:
            result = run(graph, machine, name, placement, depths, report, threads=threads)
        results.append(result)
    if options.json:
        print_json({"machine": machine.to_json(), "outcomes": [o.to_json() for o in results]})
    else:
        _show(results)
    if any(result.error for result in results[: len(ours)]):
        raise typer.Exit(1)


def _numbers(text: str, option: str) -> list[int]:
    from dots1_local.sizes import parse_context

    numbers = [parse_context(part) for part in text.split(",") if part.strip()]
    if numbers != sorted(set(numbers)) or not numbers:
        raise UsageError(f"{option} {text!r} is not an ascending list such as 512,4096,16k")
    return numbers


def _choose_workers(plans: Sequence["Placement"], given: Sequence[str]) -> Sequence[str]:
    """Return the workers that the plans name, or else the given ones."""
    if plans and given:
        raise UsageError("--plan names the workers it uses; leave out --worker")
    named = {placement.workers for placement in plans if placement.workers}
    if len(named) > 1:
        raise UsageError("these plans are for different workers; try them one at a time")
    return [*named.pop()] if named else given


def _placements(
    graph: "ModelGraph",
    machine: "Hardware",
    ours: Sequence[tuple[str, "Placement"]],
    ubatches: Sequence[int],
    alternatives: bool,
) -> Iterable[tuple[str, "Placement | None"]]:
    from dots1_local.placement.alternatives import baselines, with_ubatch

    yield from ours
    for name, placement in ours:
        for ubatch in ubatches:
            if ubatch != placement.ubatch:
                yield (
                    f"{name}, ubatch {ubatch}",
                    with_ubatch(graph, machine, placement, ubatch),
                )
    if alternatives:
        tried = [placement for _, placement in ours]
        for name, placement in baselines(graph, machine, ours[0][1]):
            if placement not in tried:  # several put everything on a large device
                tried.append(placement)
                yield name, placement
        yield "llama.cpp by itself", None


def _show(results: Sequence["BenchResult"]) -> None:
    rows = [row for result in results for row in _speed_rows(result)]
    header = ("placement", "context", "prefill", "predicted", "decode", "predicted", "loaded in")
    print_table(header, rows, numbers_from=1)
    print("\ntokens per second; prefill continues the context, decode adds single tokens to it\n")
    usage = [row for result in results for row in _byte_rows(result)]
    if usage:
        print_table(("placement", "device", "what", "bytes", "predicted"), usage, numbers_from=3)
    for result in results:
        if result.error:
            notice(f"{result.name}: {result.error}")
        for warning in result.measurement.warnings if result.measurement else ():
            notice(f"{result.name}: {warning}")


def _speed_rows(result: "BenchResult") -> Iterable[Sequence[str]]:
    found = result.measurement
    if found is None:
        yield result.name, "-", "failed", "-", "failed", "-", "-"
        return
    predicted = {depth.tokens: depth for depth in result.predicted}
    name, seconds = result.name, f"{found.load_seconds:.1f} s"
    for depth in found.depths:
        expected = predicted.get(depth.tokens)
        yield (
            name,
            f"{depth.tokens:,}",
            f"{depth.prefill:.1f}",
            _compared(expected, depth, "prefill"),
            f"{depth.decode:.2f}",
            _compared(expected, depth, "decode"),
            seconds,
        )
        name = seconds = ""


def _compared(predicted: "Depth | None", real: "Depth", what: str) -> str:
    """Format a prediction, and how far it is from the measurement."""
    if predicted is None:
        return "-"
    value = getattr(predicted, what)
    return f"{value:.{1 if what == 'prefill' else 2}f} ({value / getattr(real, what) - 1:+.0%})"


def _byte_rows(result: "BenchResult") -> Iterable[Sequence[str]]:
    from dots1_local.engine.log import compare

    if result.measurement is None:
        return
    name = result.name
    for each in compare(result.measurement.allocated, result.usage):
        predicted = human_bytes(each.predicted) if result.usage else "-"
        yield name, each.device, each.what, human_bytes(each.real), predicted
        name = ""
