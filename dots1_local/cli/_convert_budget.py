"""The options of `dots1 convert` that exclude each other, and the budget that they state."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dots1_local.cli._output import notice
from dots1_local.cli._refine import check_refinement

if TYPE_CHECKING:
    from dots1_local.architecture import Dots1Config
    from dots1_local.cli._convert_options import ConvertOptions
    from dots1_local.convert import Budget

__all__ = ["check_options", "memory_budget", "read_budget"]


def check_options(options: "ConvertOptions") -> None:
    """Refuse options that contradict each other, before anything is opened."""
    budgets = [options.size, options.bpw, options.max_kld, options.fit_memory]
    if options.for_ is not None:
        budgets = [options.for_, options.bpw, options.fit_memory]
    given = sum(value is not None for value in budgets)
    typed = options.type_ is not None
    names = "--for, --size, --bpw, --max-kld and --fit-memory"
    if options.output is None and not options.dry_run:
        raise typer.BadParameter("name the file to write", param_hint="--output / -o")
    if options.plan and (typed or options.tensor_type or options.pad_experts != "auto"):
        raise typer.BadParameter("a plan sets all types and the padding", param_hint="--plan")
    if given > 1:
        raise typer.BadParameter(
            f"{names} exclude each other, but --for takes a --size or a --max-kld"
        )
    if options.for_ is None and (options.tok_s is not None or options.front is not None):
        raise typer.BadParameter("--tok-s and --front go with --for")
    if options.front and (options.tok_s is not None or options.max_kld is not None):
        raise typer.BadParameter("a target leaves one file; there is no front to draw")
    memory = options.for_ is not None or options.fit_memory is not None
    if (options.context is not None or options.kv_type is not None) and not memory:
        raise typer.BadParameter("--context and --kv-type go with --for or --fit-memory")
    check_refinement(options)
    measures = options.refine and (options.file or options.chat)
    if given and options.calibration is None and not measures:
        raise typer.BadParameter(
            f"{names} need what dots1 calibrate measured", param_hint="--calibration"
        )
    if options.one_layout and (options.for_ is not None or not given):
        raise typer.BadParameter(
            "--one-layout goes with --size, --bpw, --max-kld or --fit-memory, and without --for"
        )
    if given and (typed or options.plan):
        raise typer.BadParameter("--type and --plan leave a budget nothing to decide")


def read_budget(options: "ConvertOptions") -> "Budget | None":
    """Return the budget that needs no checkpoint, or None."""
    from dots1_local.convert import Budget
    from dots1_local.sizes import parse_size

    if options.size is not None:
        return Budget("size", parse_size(options.size))
    if options.bpw is not None:
        return Budget("bpw", options.bpw)
    return None if options.max_kld is None else Budget("kld", options.max_kld)


def memory_budget(config: "Dots1Config", memory: str, options: "ConvertOptions") -> "Budget":
    """Return what a memory or machine leaves for weights, and print how that was reckoned."""
    from dots1_local.convert import Budget
    from dots1_local.devices.machine import find_hardware, hardware_names
    from dots1_local.placement.memory import parse_memory, weights_budget
    from dots1_local.placement.placement import default_context
    from dots1_local.sizes import parse_context

    described = memory in hardware_names() or Path(memory).is_file()
    machine = find_hardware(memory) if described else parse_memory(memory)
    tokens = default_context(config.max_position_embeddings)
    if options.context:
        tokens = parse_context(options.context)
    found = weights_budget(config, machine, tokens, options.kv_type or "f16")
    notice(found.explanation)
    return Budget("weights", found.weights)
