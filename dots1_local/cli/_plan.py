"""`dots1 plan`: where a model would live on a machine, and how fast it would be."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dots1_local.cli._output import Json, Threads, human_bytes, notice, print_json, progress_bar
from dots1_local.cli._planned import Ram, Vram, Workers, limits
from dots1_local.errors import UsageError

if TYPE_CHECKING:
    from dots1_local.devices.hardware import Hardware
    from dots1_local.placement.model_graph import ModelGraph
    from dots1_local.placement.placement import Placement

__all__ = ["plan"]


def plan(
    model: Annotated[Path, typer.Argument(help="A dots1 GGUF file.", metavar="FILE.gguf")],
    context: Annotated[
        str | None,
        typer.Option("--context", "-c", help="Tokens such as 8k; 16k by default."),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option("--kv", help="KV cache type; f16 if unset, or q8_0 if only that fits."),
    ] = None,
    parallel: Annotated[
        int, typer.Option("--parallel", help="For so many answers at once, with a context each.")
    ] = 1,
    vram: Vram = None,
    ram: Ram = None,
    hardware: Annotated[
        str | None,
        typer.Option("--hardware", help="Another machine: a description's file or name."),
    ] = None,
    worker: Workers = None,
    threads: Threads = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="Show this plan, which you may have edited, not a new one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show where a model's parts would live, and how fast it would run.

    dots1 plan dots1-DQ4.gguf --context 16k

    dots1 plan dots1-DQ4.gguf --context 8k --parallel 4

    dots1 plan dots1-DQ4.gguf --hardware 24gb-64gb

    dots1 plan dots1-DQ4.gguf --json > plan.json

    dots1 plan dots1-DQ4.gguf --plan plan.json
    """
    from dots1_local.files.gguf import GGUFFile
    from dots1_local.placement.alternatives import explain_shortfall
    from dots1_local.placement.footprint import limited
    from dots1_local.placement.memory import parse_context
    from dots1_local.placement.model_graph import ModelGraph
    from dots1_local.placement.placement import check_made_for, load_placement
    from dots1_local.placement.planner import place

    if plan and (context or kv or parallel != 1 or threads or worker):
        raise UsageError(
            "--plan says all of --context, --kv, --parallel, --threads and --worker; edit it, or "
            "leave them out"
        )
    tokens = parse_context(context) if context else None
    bounds = limits(vram, ram)
    gguf = GGUFFile.open(model)
    graph = ModelGraph.read(gguf)
    made = load_placement(plan) if plan else None
    if made:
        check_made_for(made, gguf)
    workers = [*made.workers] if made and hardware is None else worker or []
    found = _machine(hardware, workers)
    machine = limited(found, **bounds)
    placement = made or place(
        gguf, machine, context=tokens, sequences=parallel, kv_type=kv, threads=threads
    )
    for sentence in (
        *_warnings(graph, found, placement),
        *_beyond(found, bounds),
        *_unmeasured(found, described=hardware is not None),
    ):
        notice(sentence)
    shortfall = explain_shortfall(graph, machine, placement)
    if as_json:
        print_json(_as_json(graph, machine, placement, shortfall))
    else:
        _show(model, graph, machine, placement)
    if shortfall is not None:
        notice(f"dots1: {model.name} on {machine.name}: {shortfall}")
        raise typer.Exit(1)


def _machine(name: str | None, workers: list[str]) -> "Hardware":
    """The machine to plan for: this one, or a description's."""
    from dots1_local.devices.machine import find_hardware, this_machine

    if name is None:
        with progress_bar("looking at this machine") as report:
            return this_machine(workers, measure="cached", progress=report)
    if workers:
        raise UsageError("--worker is for this machine; a description has its workers in it")
    return find_hardware(name)


def _warnings(graph: "ModelGraph", machine: "Hardware", placement: "Placement") -> Iterator[str]:
    """What to know of a plan beforehand."""
    from dots1_local.placement.footprint import kv_type_unsupported

    trained = graph.config.max_position_embeddings
    if placement.context > trained:
        yield (
            f"a context of {placement.context:,} tokens is beyond the {trained:,} that the model "
            "was trained for"
        )
    if sentence := kv_type_unsupported(machine, placement):
        yield f"{sentence}; the CPU does it then, and the KV cache is copied there for every token"


def _beyond(machine: "Hardware", bounds: dict[str, int | None]) -> Iterator[str]:
    """Which limits are none, the machine having less."""
    gpus = [device for device in machine.devices if not device.worker]
    asked = [("--ram", machine.cpu), *(("--vram", gpu) for gpu in gpus)]
    for option, device in asked:
        wanted = bounds[option.removeprefix("--")]
        if wanted is not None and wanted > device.total:
            yield (
                f"{option} {human_bytes(wanted)} is more than the {human_bytes(device.total)} of "
                f"{device.name}, which is planned with"
            )


def _unmeasured(machine: "Hardware", *, described: bool) -> Iterator[str]:
    """Of which devices no speeds are known, and how they would be."""
    lacking = [each.name for each in (machine.cpu, *machine.devices) if each.speed is None]
    if lacking and described:
        yield f"{machine.name} gives no speeds of {', '.join(lacking)}"
    elif lacking:
        workers = dict.fromkeys(each.worker for each in machine.devices if each.worker)
        command = " ".join(["dots1 hardware", *(f"--worker {worker}" for worker in workers)])
        yield (
            f"{machine.name} has not been measured ({', '.join(lacking)}): run {command}, and "
            "plan again with speeds"
        )


def _show(model: Path, graph: "ModelGraph", machine: "Hardware", placement: "Placement") -> None:
    from dots1_local.cli._plan_screen import show_plan

    show_plan(model, graph, machine, placement)


def _as_json(
    graph: "ModelGraph", machine: "Hardware", placement: "Placement", shortfall: Any
) -> dict[str, Any]:
    from dots1_local.placement.llama_args import command_line
    from dots1_local.placement.speed_model import forecast

    predicted = {
        "hardware": machine.name,
        **forecast(graph, machine, placement).to_json(),
        "command": command_line(placement, machine, str(graph.gguf.files[0])),
        "shortfall": None if shortfall is None else str(shortfall),
    }
    return placement.to_json() | {"predicted": predicted}
