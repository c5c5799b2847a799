"""Budgets on the command line of `dots1 convert`, and why the types are what they are."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dots1_local.cli._output import human_bytes, notice

if TYPE_CHECKING:
    from dots1_local.convert import Budget, Conversion
    from dots1_local.quant.allocation import Allocation, Move, Part

__all__ = [
    "Bpw",
    "Calibration",
    "Context",
    "FitMemory",
    "KVType",
    "MaxKLD",
    "Size",
    "allocation_json",
    "nats",
    "print_allocation",
    "read_budget",
    "warn_of_budget",
    "warn_of_importance",
]

_BUDGETS = "--size, --bpw, --max-kld and --fit-memory"

Size = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Choose types for a file of at most SIZE, e.g. 48GB."),
]
Bpw = Annotated[
    float | None, typer.Option(metavar="BITS", help="Choose types for so many bits per weight.")
]
MaxKLD = Annotated[
    float | None,
    typer.Option(
        "--max-kld",
        metavar="NATS",
        help="Choose types for the smallest file with this predicted KL divergence.",
    ),
]
FitMemory = Annotated[
    str | None,
    typer.Option(metavar="MEMORY", help="Choose types to fit, e.g., '24GB gpu + 64GB ram'."),
]
Context = Annotated[
    str | None,
    typer.Option(
        metavar="TOKENS",
        help="With --fit-memory: the context to fit, e.g. 32k.",
        show_default="16k",
    ),
]
KVType = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE", help="With --fit-memory: the KV cache's type.", show_default="f16"
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="What dots1 calibrate wrote: importance, and the sensitivity a budget needs.",
    ),
]


def read_budget(
    checkpoint: Path,
    calibration: Path | None,
    *,
    size: str | None,
    bpw: float | None,
    max_kld: float | None,
    fit_memory: str | None,
    context: str | None,
    kv_type: str | None,
) -> "Budget | None":
    """The budget that the options name, or None."""
    from dots1_local.convert import Budget
    from dots1_local.sizes import parse_size

    given = [value for value in (size, bpw, max_kld, fit_memory) if value is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"{_BUDGETS} exclude each other")
    if (context is not None or kv_type is not None) and fit_memory is None:
        raise typer.BadParameter("--context and --kv-type go with --fit-memory")
    if given and calibration is None:
        raise typer.BadParameter(
            f"{_BUDGETS} need what dots1 calibrate measured", param_hint="--calibration"
        )
    if size is not None:
        return Budget("size", parse_size(size))
    if bpw is not None:
        return Budget("bpw", bpw)
    if max_kld is not None:
        return Budget("kld", max_kld)
    if fit_memory is not None:
        return _memory_budget(checkpoint, fit_memory, context or "16k", kv_type or "f16")
    return None


def _memory_budget(checkpoint: Path, memory: str, context: str, kv_type: str) -> "Budget":
    from dots1_local.checkpoint import Checkpoint
    from dots1_local.convert import Budget
    from dots1_local.runtime.memory import parse_context, weights_budget

    config = Checkpoint.open(checkpoint).config
    found = weights_budget(config, memory, parse_context(context), kv_type)
    notice(found.explanation)
    return Budget("weights", found.weights)


def warn_of_importance(conversion: "Conversion", calibration: Path) -> None:
    """Say where the sensitivity was measured with another importance than is used."""
    from dots1_local.quant.sensitivity import load_sensitivity

    used = conversion.importance
    if used and used.sha256 != load_sensitivity(calibration / "sensitivity.json").imatrix:
        notice(
            f"the sensitivity in {calibration} was measured with another importance file than "
            f"{used.path.name}; its predictions hold as far as the two agree"
        )


def warn_of_budget(conversion: "Conversion", budget: "Budget", split: int | None) -> None:
    """Say where a file stays further below its budget than the steps between types usually do."""
    from dots1_local.quant.allocate import TOLERANCE

    if budget.kind == "size":
        left = budget.value - conversion.file_bytes(split)
    elif budget.kind == "weights":
        left = budget.value - conversion.nbytes
    else:
        return
    if left > TOLERANCE * budget.value:
        notice(f"{human_bytes(left)} stay free: no way to fill them does less damage")


def print_allocation(
    conversion: "Conversion", allocation: "Allocation", split: int | None = None
) -> None:
    """Who got what, what more bytes are worth, what was just missed, and the other width."""
    from dots1_local.cli._table import print_table
    from dots1_local.quant.allocation import summarise

    parts = summarise(conversion.tensors, allocation.shares)
    rows = [_part_row(part, allocation.kl) for part in parts]
    bpw = conversion.nbytes * 8 / sum(part.parameters for part in parts)
    total = ("total", "", "", human_bytes(conversion.nbytes), f"{bpw:.3f}", "100.0%")
    header = ("role", "part", "types", "bytes", "bpw", "KLD")
    print_table(header, rows, numbers_from=3, total=total)
    unit, scale = ("GB", 1e9) if conversion.nbytes >= 1e9 else ("MB", 1e6)
    print(f"""
{allocation.plan.recipe}: {conversion.file_bytes(split):,} bytes with headers
predicted KL divergence: {nats(allocation.kl)} nats a token
experts: {_widths(conversion, allocation)}
at the margin: a {unit} more lowers it by {nats(allocation.price * scale / 1e9)}

just missed""")
    _print_moves(allocation.upgrades, unit, scale)
    print("\ncheapest to give up")
    _print_moves(allocation.downgrades, unit, scale)


def allocation_json(conversion: "Conversion", allocation: "Allocation") -> dict[str, Any]:
    """The same for scripts."""
    from dots1_local.quant.allocation import summarise

    return {
        "kl_per_gb": allocation.price,
        "parts": [asdict(p) for p in summarise(conversion.tensors, allocation.shares)],
        "upgrades": [asdict(move) for move in allocation.upgrades],
        "downgrades": [asdict(move) for move in allocation.downgrades],
        "other_width": asdict(allocation.other) if allocation.other else None,
    }


def _part_row(part: "Part", whole: float) -> Sequence[str]:
    types = ", ".join(f"{count} {kind}" for kind, count in part.types.items())
    share = f"{part.kl / whole:.1%}" if part.kl and whole else "-"
    bpw = f"{part.nbytes * 8 / part.parameters:.3f}"
    return part.role, part.part, types, human_bytes(part.nbytes), bpw, share


def _print_moves(moves: "Sequence[Move]", unit: str, scale: float) -> None:
    from dots1_local.cli._table import print_table

    rows = [
        (
            move.tensor,
            move.before,
            move.after,
            f"{'+' if move.nbytes > 0 else '-'}{human_bytes(abs(move.nbytes))}",
            f"{'+' if move.kl > 0 else '-'}{nats(abs(move.kl))}",
            nats(abs(move.kl / move.nbytes) * scale),
        )
        for move in moves
    ]
    print_table(("tensor", "from", "to", "bytes", "KLD", f"KLD/{unit}"), rows, numbers_from=3)


def _widths(conversion: "Conversion", allocation: "Allocation") -> str:
    published = conversion.checkpoint.config.moe_intermediate_size

    def said(width: int) -> str:
        return f"{width} wide ({'unpadded' if width == published else 'padded'})"

    chosen, other = said(allocation.plan.expert_width), allocation.other
    if other is None:
        return chosen
    return (
        f"{chosen}; {said(other.expert_width)} it would be {nats(other.kl)} "
        f"in {human_bytes(other.nbytes)}"
    )


def nats(kl: float) -> str:
    """Three digits that count, and no exponent."""
    from math import floor, log10

    digits = 2 - floor(log10(kl)) if 0 < kl < 100 else 2
    return f"{kl:.{min(max(digits, 0), 12)}f}"
