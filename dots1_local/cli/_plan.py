"""`dots1 plan`: show where a model would live on a machine, and how fast it would be."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dots1_local.cli import _options as shared
from dots1_local.cli._expert_cache import cache_json, predicted_cache, show_cache
from dots1_local.cli._model import list_types, read_model
from dots1_local.cli._options import option, verb
from dots1_local.cli._output import notice, plural, print_json, print_table, progress_bar
from dots1_local.errors import UsageError
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from dots1_local.devices.hardware import Hardware
    from dots1_local.placement.model_graph import ModelGraph
    from dots1_local.placement.placement import Placement
    from dots1_local.placement.speed_model import Forecast

__all__ = ["PlanOptions", "plan", "plan_json"]

# The classes of bytes that the table shows, and the fields of a Usage that each class sums.
_CLASSES = {
    "attention": ("attention", "norm"),
    "shared experts": ("shared",),
    "routed experts": ("routed",),
    "other weights": ("dense", "router", "embedding", "head"),
    "KV cache": ("kv",),
    "compute": ("compute", "scratch"),
}
_HOST_MEMORY = {
    "plain": "as it is",
    "pinned": "pinned, which GPUs read at full speed",
    "repacked": "repacked in the order that the CPU's kernels like best",
    "mapped": "the file itself, mapped",
}
_NEVER = 1 << 20  # tokens; no placement has a batch that large


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
    from dots1_local.verify.correct import corrected, corrections

    _check(options)
    tokens = parse_context(options.context) if options.context else None
    limits = shared.memory_limits(options.vram, options.ram)
    if _list_types(options, limits, tokens):
        return
    gguf = corrected(read_model(options.model))
    graph = ModelGraph.read(gguf)
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
        content = plan_json(graph, machine, placement, shortfall)
        if cache is not None:
            content["predicted"]["expert_cache"] = cache_json(cache, machine, graph)
        print_json(content)
    else:
        _show(options.model, graph, machine, placement)
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


def plan_json(
    graph: "ModelGraph", machine: "Hardware", placement: "Placement", shortfall: Any
) -> dict[str, Any]:
    """Return a plan file's content, with what is predicted of it."""
    from dots1_local.files.names import unicode_name
    from dots1_local.placement.llama_args import command_line
    from dots1_local.placement.speed_model import forecast

    predicted = {
        "hardware": machine.name,
        **forecast(graph, machine, placement).to_json(),
        "command": command_line(placement, machine, unicode_name(graph.path)),
        "shortfall": None if shortfall is None else str(shortfall),
    }
    return placement.to_json() | {"predicted": predicted}


def _show(model: Path, graph: "ModelGraph", machine: "Hardware", placement: "Placement") -> None:
    """Print bytes by device, what is where, speeds, and the flags for llama.cpp."""
    from dots1_local.placement.llama_args import command_line
    from dots1_local.placement.placement import human_context
    from dots1_local.placement.speed_model import forecast

    predicted = forecast(graph, machine, placement)
    print(
        f"{model.name} ({human_bytes(placement.model_bytes)}) on {machine.name}, "
        f"context of {human_context(placement.context, placement.sequences)} "
        f"token{'s' * (placement.tokens != 1)}\n"
    )
    _print_bytes(predicted)
    print()
    for line in (*_locations(graph, placement), *_settings(placement)):
        print(line)
    print()
    _print_speeds(predicted)
    if placement.sequences > 1 and predicted.speeds:
        print("All speeds are those of one answer alone.")
    print("\nllama.cpp's own programs do the same with:")
    print(command_line(placement, machine, str(graph.path)))


def _print_bytes(predicted: "Forecast") -> None:
    usage = predicted.usage
    rows = [
        (label, *(human_bytes(sum(getattr(used, n) for n in names)) for used in usage.values()))
        for label, names in _CLASSES.items()
    ]
    margins = [predicted.free[name] for name in usage]
    rows.append(("margin left", *(f"{'-' * (n < 0)}{human_bytes(abs(n))}" for n in margins)))
    total = ("in all", *(human_bytes(usage[n].total + predicted.free[n]) for n in usage))
    header = ("", *("RAM" if name == "CPU" else name for name in usage))
    print_table(header, rows, numbers_from=1, total=total)


def _locations(graph: "ModelGraph", placement: "Placement") -> Iterable[str]:
    """Say on which devices the weights, KV cache and routed experts of each layer are."""
    from dots1_local.placement.model_graph import is_routed

    where: dict[str, dict[str, list[int]]] = {"layers": {}, "KV cache": {}, "routed experts": {}}
    parts: dict[int, dict[str, str]] = {}
    for op in graph.ops:
        if op.part == "attn_q":
            device, kv = placement.device_of(op.name), placement.device_of_layer(op.layer)
            where["layers"].setdefault(device, []).append(op.layer)
            where["KV cache"].setdefault(kv, []).append(op.layer)
        elif is_routed(op.part):
            parts.setdefault(op.layer, {})[op.part] = placement.device_of(op.name)
    split = {layer: devices for layer, devices in parts.items() if len(set(devices.values())) > 1}
    for layer, devices in parts.items():
        if layer not in split:
            where["routed experts"].setdefault(next(iter(devices.values())), []).append(layer)
    for label, layers in where.items():
        on = ", ".join(f"{_ranges(each)} on {_name(device)}" for device, each in layers.items())
        yield f"{label:16}{on}"
    for layer, devices in split.items():
        on = ", ".join(f"{part} on {_name(device)}" for part, device in devices.items())
        yield f"{f'in layer {layer}':16}{on}"


def _name(device: str) -> str:
    return "RAM" if device == "CPU" else device


def _ranges(numbers: list[int]) -> str:
    """Return for example '0-2 5' for [0, 1, 2, 5]."""
    first = [number for number in numbers if number - 1 not in numbers]
    last = [number for number in numbers if number + 1 not in numbers]
    ends = zip(first, last, strict=True)
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in ends)


def _settings(placement: "Placement") -> Iterable[str]:
    flash = "flash attention" if placement.flash_attention else "no flash attention"
    yield f"{'KV type':16}{placement.kv_type}, {flash}"
    yield f"{'ubatch':16}{placement.ubatch:,} tokens, {plural(placement.threads, 'thread')}"
    held = _HOST_MEMORY[placement.host_memory]
    batch = placement.offload_min_batch
    if batch is not None:
        held += (
            "; no ubatch is worth fetching weights for"
            if batch >= _NEVER
            else f"; ubatches of {batch:,} tokens or more fetch weights to the first GPU"
        )
    yield f"{'host memory':16}{held}"


def _print_speeds(predicted: "Forecast") -> None:
    if not predicted.speeds:
        print("Speeds are not predicted: the machine has not been measured.")
        return
    rows = []
    for at in predicted.speeds:
        prefill = f"{at.prefill:,.0f}" if at.prefill >= 10 else f"{at.prefill:.2f}"
        rows.append((f"{at.context:,}", prefill, f"{at.decode:.2f}", f"{at.cost:.3f}"))
    header = ("context", "prefill tok/s", "decode tok/s", "1,000 more cost tok/s")
    print_table(header, rows, numbers_from=0)
    print(f"Prefill is of a prompt of {plural(predicted.prompt, 'token')}.")
