"""`dots1 plan`: where a model would live on a machine, and how fast it would be."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dots1_local.cli._output import Json, Threads, notice, print_json, progress_bar
from dots1_local.errors import UsageError

if TYPE_CHECKING:
    from dots1_local.runtime.devices.hardware import Hardware
    from dots1_local.runtime.placing.placement import Placement
    from dots1_local.runtime.placing.steps import Graph

__all__ = ["plan"]


def plan(
    model: Annotated[Path, typer.Argument(help="A dots1 GGUF file.", metavar="FILE.gguf")],
    context: Annotated[
        str | None,
        typer.Option("--context", "-c", help="Tokens such as 16k, which it is if unset."),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option("--kv", help="KV cache type; f16 if unset, or q8_0 if only that fits."),
    ] = None,
    vram: Annotated[
        str | None, typer.Option("--vram", help="Use so much of each GPU, such as 20GB.")
    ] = None,
    ram: Annotated[str | None, typer.Option("--ram", help="Use so much RAM, such as 60GB.")] = None,
    hardware: Annotated[
        str | None,
        typer.Option("--hardware", help="Another machine: a description's file or name."),
    ] = None,
    worker: Annotated[
        list[str] | None,
        typer.Option("--worker", help="HOST:PORT of a dots1 worker to use; may be repeated."),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show where a model's parts would live, and how fast it would run.

    dots1 plan dots1-DQ4.gguf --context 16k

    dots1 plan dots1-DQ4.gguf --hardware 24gb-64gb

    dots1 plan dots1-DQ4.gguf --json > plan.json
    """
    from dots1_local.gguf_file import GGUFFile
    from dots1_local.runtime.placing.memory import parse_context
    from dots1_local.runtime.placing.planner import place
    from dots1_local.runtime.placing.room import limited
    from dots1_local.runtime.placing.shortfall import shortfall_of
    from dots1_local.runtime.placing.steps import Graph
    from dots1_local.sizes import parse_size

    tokens = parse_context(context) if context else None
    limits = {
        "vram": parse_size(vram) if vram else None,
        "ram": parse_size(ram) if ram else None,
    }
    gguf = GGUFFile.open(model)
    graph = Graph.read(gguf)
    machine = limited(_machine(hardware, worker or []), **limits)
    placement = place(gguf, machine, context=tokens, kv_type=kv, threads=threads)
    _warn(graph, machine, placement)
    shortfall = shortfall_of(graph, machine, placement)
    if as_json:
        print_json(_as_json(graph, machine, placement, shortfall))
    else:
        _show(model, graph, machine, placement)
    if shortfall is not None:
        notice(f"dots1: {model.name} on {machine.name}: {shortfall}")
        raise typer.Exit(1)


def _machine(name: str | None, workers: list[str]) -> "Hardware":
    """The machine to plan for: this one, or a description's."""
    from dots1_local.runtime.devices.machine import find_hardware, this_machine

    if name is None:
        with progress_bar("looking at this machine") as report:
            return this_machine(workers, measure="cached", progress=report)
    if workers:
        raise UsageError("--worker is for this machine; a description has its workers in it")
    return find_hardware(name)


def _warn(graph: "Graph", machine: "Hardware", placement: "Placement") -> None:
    from dots1_local.runtime.placing.speed_model import is_measured

    trained = graph.config.max_position_embeddings
    if placement.context > trained:
        notice(
            f"a context of {placement.context:,} tokens is beyond the {trained:,} that the model "
            "was trained for"
        )
    if not is_measured(machine, placement.devices):
        notice(
            f"{machine.name} has not been measured: run dots1 hardware, and speeds are predicted"
        )


def _show(model: Path, graph: "Graph", machine: "Hardware", placement: "Placement") -> None:
    from dots1_local.cli._plan_screen import show_plan

    show_plan(model, graph, machine, placement)


def _as_json(
    graph: "Graph", machine: "Hardware", placement: "Placement", shortfall: Any
) -> dict[str, Any]:
    from dots1_local.runtime.placing.flags import command_line
    from dots1_local.runtime.placing.forecast import forecast

    predicted = {
        "hardware": machine.name,
        **forecast(graph, machine, placement).to_json(),
        "command": command_line(placement, machine, str(graph.gguf.files[0])),
        "shortfall": None if shortfall is None else str(shortfall),
    }
    return placement.to_json() | {"predicted": predicted}
