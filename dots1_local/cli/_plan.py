"""`dots1 plan`: show where a model would live on a machine, and how fast it would be."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dots1_local.cli import _options as shared
from dots1_local.cli._expert_cache import cache_json, predicted_cache, show_cache
from dots1_local.cli._model import list_types, read_model
from dots1_local.cli._options import option, verb
from dots1_local.cli._output import notice, print_json, progress_bar
from dots1_local.cli._plan_report import plan_json, show_plan
from dots1_local.errors import UsageError
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from dots1_local.devices.hardware import Hardware
    from dots1_local.placement.model_graph import ModelGraph
    from dots1_local.placement.placement import Placement

__all__ = ["PlanOptions", "plan"]


@dataclass(frozen=True, eq=False, repr=False)
class PlanOptions:
    model: shared.Model
    context: str | None = option(
        "Plan for this many tokens, such as 32k.", "--context", "-c", default="16k"
    )
    kv: shared.KVType = None
    parallel: int = option(
        "Plan for this many answers at once, each with the whole context.", value=1
    )
    vram: shared.Vram = None
    ram: shared.Ram = None
    hardware: str | None = option(
        "Plan for the machine that this file or name describes.", default="this machine"
    )
    worker: shared.Workers = None
    threads: shared.Threads = None
    plan: Path | None = option("Show this plan, which you may have edited, instead of a new one.")
    routing: str | None = option(
        "Also predict llama.cpp's cache of experts in VRAM, from the routing in this folder of "
        "dots1 calibrate, or organisation/model on the Hugging Face hub.",
        metavar="CALIBRATION",
        default="FILE.gguf.calibration if there is one",
    )
    json: shared.Json = False


@verb
def plan(options: PlanOptions) -> None:
    """Show where the parts of a model would live, and how fast it would run.

    dots1 plan dots1-DQ4.gguf --context 16k

    dots1 plan dots1-DQ4.gguf --context 8k --parallel 4

    dots1 plan dots1-DQ4.gguf --hardware 24gb-64gb

    dots1 plan ORG/NAME:Q4_K_M --hardware 24gb-64gb

    dots1 plan dots1-DQ4.gguf --json > plan.json

    dots1 plan dots1-DQ4.gguf --plan plan.json

    dots1 plan dots1-DQ4.gguf --hardware 24gb-128gb --routing calibrated
    """
    from dots1_local.placement.alternatives import explain_shortfall
    from dots1_local.placement.footprint import limited
    from dots1_local.placement.model_graph import ModelGraph
    from dots1_local.placement.placement import check_made_for, load_placement
    from dots1_local.placement.planner import place
    from dots1_local.sizes import parse_context
    from dots1_local.verify.correct import corrected, corrections, key_overrides

    _check(options)
    tokens = parse_context(options.context) if options.context else None
    limits = shared.memory_limits(options.vram, options.ram)
    if _list_types(options, limits, tokens):
        return
    gguf = corrected(read_model(options.model))
    graph, keys = ModelGraph.read(gguf), key_overrides(gguf.changes)
    placement = load_placement(options.plan) if options.plan else None
    if placement:
        check_made_for(placement, gguf)
    found = _find_machine(options, placement)
    machine = limited(found, **limits)
    placement = placement or place(
        gguf,
        machine,
        context=tokens,
        sequences=options.parallel,
        kv_type=options.kv,
        threads=options.threads,
    )
    for warning in (
        *_warnings(graph, found, placement),
        *_excess_limits(found, limits),
        *_missing_speeds(found, described=options.hardware is not None),
        *_stored(options, graph.path),
        *corrections(gguf),
    ):
        notice(warning)
    shortfall = explain_shortfall(graph, machine, placement)
    cache = predicted_cache(graph, machine, placement, options.routing)
    if options.json:
        content = plan_json(graph, machine, placement, shortfall, keys)
        if cache is not None:
            content["predicted"]["expert_cache"] = cache_json(cache, machine, graph)
        print_json(content)
    else:
        show_plan(options.model, graph, machine, placement, keys)
        if cache is not None:
            show_cache(cache, machine, graph)
    if shortfall is not None:
        notice(f"dots1: {options.model.name} on {machine.name}: {shortfall}")
        raise typer.Exit(1)


def _list_types(options: PlanOptions, limits: dict[str, int | None], tokens: int | None) -> bool:
    """Print what each type would do if the model is on the hub and no type is named."""
    from dots1_local.placement.footprint import limited

    def machine() -> "Hardware":
        return limited(_find_machine(options, None), **limits)

    return options.plan is None and list_types(options.model, machine, tokens, options.json)


def _check(options: PlanOptions) -> None:
    """Refuse options that contradict each other."""
    new = (options.context, options.kv, options.threads, options.worker)
    if options.plan and (any(new) or options.parallel != 1):
        raise UsageError(
            "--plan sets all of --context, --kv, --parallel, --threads and --worker; edit the "
            "file, or leave these options out"
        )
    if options.hardware is not None and options.worker:
        raise UsageError("--worker is for this machine; a description has its workers in it")


def _find_machine(options: PlanOptions, placement: "Placement | None") -> "Hardware":
    """Return this machine with its workers, or the described one."""
    from dots1_local.devices.machine import find_hardware, this_machine

    if options.hardware is not None:
        return find_hardware(options.hardware)
    workers = [*placement.workers] if placement else options.worker or []
    with progress_bar("looking at this machine") as report:
        return this_machine(workers, measure="cached", progress=report)


def _warnings(graph: "ModelGraph", machine: "Hardware", placement: "Placement") -> Iterator[str]:
    """Say what a person should know of a plan beforehand."""
    from dots1_local.placement.footprint import kv_type_unsupported

    trained = graph.config.max_position_embeddings
    if placement.context > trained:
        yield (
            f"a context of {placement.context:,} tokens is beyond the {trained:,} that the model "
            "was trained for"
        )
    if sentence := kv_type_unsupported(machine, placement):
        yield f"{sentence}; the CPU does it then, and the KV cache is copied there for every token"


def _stored(options: PlanOptions, model: Path) -> Iterator[str]:
    """Say that chat and serve have another plan."""
    from dots1_local.placement.placement import stored_placement

    stored = stored_placement(model)
    if options.plan is None and stored.exists():
        yield (
            f"{stored.name}, which dots1 convert --for stored, is the plan that chat and serve use "
            "where it fits; --plan shows it"
        )


def _excess_limits(machine: "Hardware", limits: dict[str, int | None]) -> Iterator[str]:
    """Say which limits are larger than what the machine has."""
    gpus = [device for device in machine.devices if not device.worker]
    for name, device in [("ram", machine.cpu), *(("vram", gpu) for gpu in gpus)]:
        wanted = limits[name]
        if wanted is not None and wanted > device.total:
            yield (
                f"--{name} {human_bytes(wanted)} is more than the {human_bytes(device.total)} of "
                f"{device.name}; the plan uses {human_bytes(device.total)}"
            )


def _missing_speeds(machine: "Hardware", *, described: bool) -> Iterator[str]:
    """Say which devices have no known speed, and how to measure them."""
    missing = [each.name for each in (machine.cpu, *machine.devices) if each.speed is None]
    if missing and described:
        yield f"{machine.name} gives no speeds of {', '.join(missing)}"
    elif missing:
        workers = dict.fromkeys(each.worker for each in machine.devices if each.worker)
        command = " ".join(["dots1 hardware", *(f"--worker {worker}" for worker in workers)])
        yield (
            f"{machine.name} has not been measured ({', '.join(missing)}): run {command}, and "
            "plan again with speeds"
        )
