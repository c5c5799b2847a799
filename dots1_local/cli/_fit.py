"""`dots1 convert --for`: types for a machine, its front as a table, and the stored placement."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dots1_local.cli._output import print_table, progress_bar
from dots1_local.errors import UsageError
from dots1_local.sizes import human_bytes, parse_context, parse_size

if TYPE_CHECKING:
    from dots1_local.devices.hardware import Hardware
    from dots1_local.files.checkpoint import Checkpoint
    from dots1_local.fit.front import Fit
    from dots1_local.quant.recipes import Padding

__all__ = ["FitOptions", "draw_front", "fit_machine", "show_fit", "store_placement"]

_CONTEXTS = (0, 4096, 16384)


class FitOptions(Protocol):
    """The options of `dots1 convert` that `--for` reads."""

    @property
    def for_(self) -> str | None: ...
    @property
    def tok_s(self) -> float | None: ...
    @property
    def size(self) -> str | None: ...
    @property
    def max_kld(self) -> float | None: ...
    @property
    def context(self) -> str | None: ...
    @property
    def kv_type(self) -> str | None: ...
    @property
    def imatrix(self) -> Path | None: ...
    @property
    def pad_experts(self) -> "Padding": ...
    @property
    def tensor_type(self) -> list[str] | None: ...
    @property
    def refine(self) -> bool: ...


def fit_machine(
    checkpoint: "Checkpoint", calibration: Path, overhead: int, options: FitOptions
) -> "tuple[Fit, Hardware]":
    """Search the types for the machine that --for names; a file has `overhead` bytes besides."""
    from dots1_local.convert.budget import load_calibration
    from dots1_local.fit.front import fit
    from dots1_local.fit.search import Search
    from dots1_local.placement.placement import default_context
    from dots1_local.quant.choices import choices_by_width
    from dots1_local.quant.plan import parse_overrides

    config, machine = checkpoint.config, _machine(options.for_ or "this")
    sensitivity, importance = load_calibration(calibration, options.imatrix, refine=options.refine)
    context = default_context(config.max_position_embeddings)
    if options.context:
        context = parse_context(options.context)
    choices = choices_by_width(
        config,
        sensitivity,
        covered=importance,
        padding=options.pad_experts,
        overrides=parse_overrides(options.tensor_type or []),
    )
    with progress_bar(f"files for {machine.name}") as progress:
        search = Search(
            config,
            choices,
            machine,
            context,
            recipe=f"measured for {machine.name}",
            kv_type=options.kv_type,
            progress=progress,
        )
        size = parse_size(options.size) - overhead if options.size else None
        found = fit(search, nbytes=size, tok_s=options.tok_s, kl=options.max_kld)
    return found, machine


def _machine(text: str) -> "Hardware":
    from dots1_local.devices.machine import find_hardware, this_machine

    if text == "this":
        with progress_bar("looking at this machine") as report:
            machine = this_machine(progress=report)
    else:
        machine = find_hardware(text)
    missing = [each.name for each in (machine.cpu, *machine.devices) if each.speed is None]
    if missing:
        raise UsageError(
            f"{machine.name} gives no speeds of {', '.join(missing)}; on that machine, "
            "dots1 hardware --json prints a description with speeds"
        )
    return machine


def show_fit(found: "Fit") -> None:
    """Print the front, with a mark at the file that was chosen."""
    contexts = [n for n in _CONTEXTS if n <= found.chosen.placement.context]
    rows = [
        (
            "→" if file is found.chosen else "",
            human_bytes(file.nbytes),
            f"{file.kl:.4f}",
            *(f"{speed:.1f}" for speed in file.decode_speeds(contexts)),
            f"{found.turn.prefill(file.turn, file.decode):,.0f}",
            f"{file.turn:.1f}",
        )
        for file in found.front
    ]
    speeds = [f"tok/s at {n:,}" for n in contexts]
    header = ("", "size", "KL divergence", *speeds, "prefill", "turn, s")
    print_table(header, rows, numbers_from=1)
    print(
        f"On {found.machine}. A turn reads {found.turn.prompt:,} tokens and writes "
        f"{found.turn.answer:,}."
    )


def draw_front(path: Path, found: "Fit") -> None:
    """Write the picture of the front."""
    from dots1_local.files.partial_file import write_whole
    from dots1_local.fit.picture import picture

    write_whole(path, picture(found).encode())


def store_placement(model: Path, machine: "Hardware", found: "Fit") -> Path:
    """Write the chosen placement beside the finished file, where chat and serve look for it."""
    from dots1_local.cli._plan_report import plan_json
    from dots1_local.files.gguf import GGUFFile
    from dots1_local.files.partial_file import write_whole
    from dots1_local.placement.model_graph import ModelGraph
    from dots1_local.placement.placement import stored_placement

    graph = ModelGraph.read(GGUFFile.open(model))
    chosen = found.chosen.placement
    placement = replace(chosen, model=graph.path.name, model_bytes=graph.nbytes)
    path = stored_placement(model)
    text = json.dumps(plan_json(graph, machine, placement, None), indent=1) + "\n"
    write_whole(path, text.encode())
    return path
