"""Budgets on the command line of `dots1 convert`, and why the types are what they are."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dots1_local.cli._output import human_bytes, notice

if TYPE_CHECKING:
    from dots1_local.architecture import Dots1Config
    from dots1_local.convert import Budget, Conversion
    from dots1_local.quant.allocation import Allocation, Part, TypeChange

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


def _option(name: str, metavar: str, text: str, default: str | None = None) -> Any:
    return typer.Option(
        name,
        metavar=metavar,
        help=text,
        show_default=default or False,
        rich_help_panel="Types under a budget, by what dots1 calibrate measured",
    )


Calibration = Annotated[
    Path | None,
    _option("--calibration", "DIR", "What dots1 calibrate wrote. Without a budget: its importance "
            "file is used, and the KL divergence predicted."),
]  # fmt: skip
Size = Annotated[
    str | None, _option("--size", "SIZE", "Choose types for a file of at most SIZE, e.g. 48GB.")
]
Bpw = Annotated[
    float | None, _option("--bpw", "BITS", "Choose types for at most so many bits per weight.")
]
MaxKLD = Annotated[
    float | None,
    _option("--max-kld", "NATS", "Choose types for the smallest file of at most this predicted "
            "KL divergence."),
]  # fmt: skip
FitMemory = Annotated[
    str | None,
    _option("--fit-memory", "MEMORY", "Choose types to fit: '24GB gpu + 64GB ram', or a machine "
            "that dots1 plan --hardware takes."),
]  # fmt: skip
Context = Annotated[
    str | None,
    _option("--context", "TOKENS", "With --fit-memory: the context to fit, e.g. 32k.",
            "16k, or what the model was trained for"),
]  # fmt: skip
KVType = Annotated[
    str | None, _option("--kv-type", "TYPE", "With --fit-memory: the KV cache's type.", "f16")
]


def read_budget(
    config: "Callable[[], Dots1Config]",
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
        return _memory_budget(config(), fit_memory, context, kv_type or "f16")
    return None


def _memory_budget(
    config: "Dots1Config", memory: str, context: str | None, kv_type: str
) -> "Budget":
    from dots1_local.convert import Budget
    from dots1_local.devices.machine import find_hardware, hardware_names
    from dots1_local.placement.memory import Memory, memory_of, parse_context, weights_budget
    from dots1_local.placement.placement import default_context

    described: str | Memory = memory
    if memory in hardware_names() or Path(memory).is_file():
        described = memory_of(find_hardware(memory))
    tokens = default_context(config.max_position_embeddings)
    found = weights_budget(
        config, described, parse_context(context) if context else tokens, kv_type
    )
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


def warn_of_budget(conversion: "Conversion", budget: "Budget | None", file_bytes: int) -> None:
    """Say where a file stays further below its budget than the steps between types usually do."""
    from dots1_local.quant.allocate import TOLERANCE

    if budget is None or budget.kind not in ("size", "weights"):
        return
    left = budget.value - (file_bytes if budget.kind == "size" else conversion.nbytes)
    if left > TOLERANCE * budget.value:
        notice(f"{human_bytes(left)} stay free: no way to fill them does less damage")


def print_allocation(conversion: "Conversion", allocation: "Allocation", file_bytes: int) -> None:
    """Who got what, what more bytes are worth, what was just missed, and the other width."""
    from dots1_local.cli._output import print_table
    from dots1_local.quant.allocation import summarise

    parts = summarise(conversion.tensors, allocation.shares)
    rows = [_part_row(part, allocation.kl) for part in parts]
    bpw = conversion.nbytes * 8 / sum(part.parameters for part in parts)
    total = ("total", "", "", human_bytes(conversion.nbytes), f"{bpw:.3f}", "100.0%")
    header = ("role", "part", "types", "bytes", "bpw", "of KLD")
    print_table(header, rows, numbers_from=3, total=total)
    unit, scale = ("GB", 1e9) if conversion.nbytes >= 1e9 else ("MB", 1e6)
    print(f"""
{allocation.plan.recipe}: {file_bytes:,} bytes with headers
predicted KL divergence: {nats(allocation.kl)} nats a token
experts: {_widths(conversion, allocation)}
at the margin: a {unit} more lowers it by {nats(allocation.price * scale / 1e9)}""")
    _print_moves("just missed", allocation.upgrades, unit, scale)
    _print_moves("cheapest to give up", allocation.downgrades, unit, scale)


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
    types = ", ".join(f"{count}x{kind}" for kind, count in part.types.items())  # wraps as one
    share = f"{part.kl / whole:.1%}" if part.kl and whole else "-"
    bpw = f"{part.nbytes * 8 / part.parameters:.3f}"
    return part.role, part.part, types, human_bytes(part.nbytes), bpw, share


def _print_moves(title: str, moves: "Sequence[TypeChange]", unit: str, scale: float) -> None:
    from dots1_local.cli._output import print_table

    if not moves:
        return
    rows = [
        (
            move.tensor.removesuffix(".weight"),  # or 80 columns would cut it
            move.before,
            move.after,
            f"{'+' if move.nbytes > 0 else '-'}{human_bytes(abs(move.nbytes))}",
            f"{'+' if move.kl > 0 else '-'}{nats(abs(move.kl))}",
            nats(abs(move.kl / move.nbytes) * scale),
        )
        for move in moves
    ]
    print(f"\n{title}")
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
