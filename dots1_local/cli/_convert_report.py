"""What `dots1 convert` prints: types and sizes, why a budget chose these types, and warnings."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from json import loads
from math import floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dots1_local.cli._output import notice, print_sizes, print_table
from dots1_local.cli._refine import token_warnings
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from dots1_local.convert import Budget, Conversion
    from dots1_local.quant.allocation import Allocation, TypeChange

__all__ = ["show", "show_hub", "summary", "warn"]


def warn(
    conversion: "Conversion",
    overrides: Sequence[str],
    calibration: Path | None,
    budget: "Budget | None",
    file_bytes: int,
) -> None:
    """Print what a person may not expect of this conversion."""
    for warnings in (
        _importance_warnings(conversion, calibration, budget),
        _override_warnings(conversion, overrides),
        _budget_warnings(conversion, budget, file_bytes),
        token_warnings(conversion),
    ):
        for warning in warnings:
            notice(warning)


def _importance_warnings(
    conversion: "Conversion", folder: Path | None, budget: "Budget | None"
) -> Iterator[str]:
    from dots1_local.convert.budget import sensitivity_file
    from dots1_local.quant.sensitivity import load_sensitivity

    recipe, importance = conversion.plan.recipe, conversion.importance
    if folder is not None and conversion.predicted_kl is None:
        yield (
            f"the KL divergence is not predicted, because {folder} does not hold measurements of "
            "all these types with this importance"
        )
    if recipe.endswith("without importance"):
        yield f"{recipe}: --imatrix FILE makes this size better"
    if importance is None:
        return
    if importance.partial:
        count = sum(len(experts) for experts in importance.partial.values())
        yield (
            f"{importance.path.name} has no data for {count} experts in "
            f"{len(importance.partial)} tensors; their columns count equally"
        )
    yield from _gap_warnings(conversion)
    if budget is None or folder is None:
        return
    measured = sensitivity_file(conversion.refinement is not None)
    if importance.sha256 != load_sensitivity(folder / measured).imatrix:
        yield (
            f"the sensitivity in {folder} was measured with another importance file than "
            f"{importance.path.name}; its predictions hold as far as the two files agree"
        )


def _gap_warnings(conversion: "Conversion") -> Iterator[str]:
    """Name the tensors whose type would lose weights because importance is 0 in whole blocks."""
    from dots1_local.quant.encode import ZEROED_BLOCKS

    importance, found, columns = conversion.importance, [], 0
    for tensor in conversion.tensors:
        block = ZEROED_BLOCKS.get(tensor.kind.name)
        gaps = importance.gaps(tensor.spec, block) if importance and block else ()
        if any(gaps):
            columns += sum(gaps)
            experts = [expert for expert, count in enumerate(gaps) if count]
            plural = "s" * (len(experts) > 1)
            of = f" (expert{plural} {_listed(experts)})" if len(gaps) > 1 else ""
            found.append(f"{tensor.spec.name}{of}")
    if importance is None or not found:
        return
    effect = "these columns count as much as the others on average"
    if not importance.fills_gaps:
        effect = (
            f"{conversion.plan.recipe} stores their weights as 0 or noise, as llama-quantize does; "
            "use a complete importance file or a DQ mix"
        )
    yield f"{importance.path.name} is 0 for {columns:,} columns of {_listed(found)}: {effect}"


def _listed(items: Sequence[object]) -> str:
    more = f" and {len(items) - 8:,} more" if len(items) > 8 else ""
    return ", ".join(map(str, items[:8])) + more


def _override_warnings(conversion: "Conversion", overrides: Sequence[str]) -> Iterator[str]:
    from dots1_local.quant.plan import parse_override
    from dots1_local.quant.stock import is_quantisable

    names = [each.spec.name for each in conversion.tensors if is_quantisable(each.spec)]
    for text in overrides:
        if not any(map(parse_override(text).pattern.search, names)):
            yield f"--tensor-type {text} changes nothing: it matches no tensor that is quantised"


def _budget_warnings(
    conversion: "Conversion", budget: "Budget | None", file_bytes: int
) -> Iterator[str]:
    """Warn if more of a budget is left than the steps between types usually leave."""
    from dots1_local.quant.allocate import TOLERANCE

    if budget is None or budget.kind not in ("size", "weights"):
        return
    left = budget.value - (file_bytes if budget.kind == "size" else conversion.nbytes)
    if left > TOLERANCE * budget.value:
        yield f"{human_bytes(left)} stay free: no way to fill them does less damage"


def show(conversion: "Conversion", file_bytes: int, *, tensors: bool) -> None:
    """Print the types and sizes as tables; with `tensors`, a row for every tensor first."""
    if tensors:
        rows = [
            (t.spec.name, t.kind.name, " x ".join(map(str, t.spec.shape)), human_bytes(t.nbytes))
            for t in conversion.tensors
        ]
        print_table(("tensor", "type", "shape", "bytes"), rows, numbers_from=2)
        print()
    if conversion.allocation is not None:
        _show_allocation(conversion, conversion.allocation, file_bytes)
        return
    print_sizes(
        (t.spec.role, t.kind.name, t.spec.source_elements, t.nbytes) for t in conversion.tensors
    )
    if conversion.predicted_kl is not None:
        print(f"\npredicted KL divergence: {_nats(conversion.predicted_kl)} nats per token")


def summary(conversion: "Conversion", file_bytes: int) -> dict[str, Any]:
    """Return the plan as --plan reads it, with its sizes, for --json."""
    parameters = sum(tensor.spec.source_elements for tensor in conversion.tensors)
    allocation = conversion.allocation
    return {
        **loads(conversion.plan.to_json()),
        "parameters": parameters,
        "bytes": conversion.nbytes,
        "file_bytes": file_bytes,
        "bpw": conversion.nbytes * 8 / parameters,
        "predicted_kl": conversion.predicted_kl,
        **({"allocation": _allocation_json(conversion, allocation)} if allocation else {}),
        **_hub_json(conversion),
    }


def show_hub(conversion: "Conversion", file_bytes: int) -> None:
    """Print how much must be fetched from the hub, and how much of it is on disk at once."""
    found = _hub_json(conversion)
    if not found:
        return
    hub = found["hub"]
    low, least = hub["low_disk"], hub["low_disk_least"]
    print(f"""
{hub["id"]} at commit {hub["commit"][:12]}: {human_bytes(hub["bytes"])} in {hub["shards"]} shards, \
{human_bytes(hub["cached_bytes"])} of it in the cache
with --low-disk at most {low["shards"]} shards, {human_bytes(low["bytes"])}, are on disk at once: \
{human_bytes(low["bytes"] + file_bytes)} with the GGUF file""")
    if least != low:
        print(f"if that does not fit, {least['shards']} shards, {human_bytes(least['bytes'])}")


def _hub_json(conversion: "Conversion") -> dict[str, Any]:
    """Return what the hub has; bytes on disk are those of shards alone."""
    from dots1_local.convert.from_hub import order_of
    from dots1_local.hub import HubCheckpoint
    from dots1_local.hub.shard_cache import ShardCache

    source = conversion.checkpoint
    if not isinstance(source, HubCheckpoint) or not source.shard_files:
        return {}
    whole = sum(file.size for file in source.shard_files)
    order = order_of(source, conversion.tensors)
    peaks = {"low_disk": order.peak(1), "low_disk_least": order.peak(0)}
    return {
        "hub": {
            "id": source.repo.name,
            "commit": source.repo.commit,
            "shards": len(source.shards),
            "bytes": whole,
            "cached_bytes": whole - sum(file.size for file in ShardCache(source).missing()),
            **{key: {"shards": p.shards, "bytes": p.nbytes} for key, p in peaks.items()},
        }
    }


def _show_allocation(conversion: "Conversion", allocation: "Allocation", file_bytes: int) -> None:
    """Print the types of each part, what more bytes are worth, and the nearest alternatives."""
    from dots1_local.quant.allocation import summarise

    parts = summarise(conversion.tensors, allocation.shares)
    rows = []
    for part in parts:
        types = ", ".join(f"{count}x{kind}" for kind, count in part.types.items())  # wraps as one
        bpw = f"{part.nbytes * 8 / part.parameters:.3f}"
        share = f"{part.kl / allocation.kl:.1%}" if part.kl and allocation.kl else "-"
        rows.append((part.role, part.part, types, human_bytes(part.nbytes), bpw, share))
    average = conversion.nbytes * 8 / sum(part.parameters for part in parts)
    total = ("total", "", "", human_bytes(conversion.nbytes), f"{average:.3f}", "100.0%")
    header = ("role", "part", "types", "bytes", "bpw", "of KLD")
    print_table(header, rows, numbers_from=3, total=total)
    unit, scale = ("GB", 1e9) if conversion.nbytes >= 1e9 else ("MB", 1e6)
    print(f"""
{allocation.plan.recipe}: {file_bytes:,} bytes with headers
predicted KL divergence: {_nats(allocation.kl)} nats per token
experts: {_widths(conversion, allocation)}{_layout(allocation)}
at the margin: another {unit} lowers it by {_nats(allocation.price * scale / 1e9)}""")
    _show_moves("just missed", allocation.upgrades, unit, scale)
    _show_moves("cheapest to give up", allocation.downgrades, unit, scale)


def _allocation_json(conversion: "Conversion", allocation: "Allocation") -> dict[str, Any]:
    from dots1_local.quant.allocation import summarise

    return {
        "kl_per_gb": allocation.price,
        "parts": [asdict(part) for part in summarise(conversion.tensors, allocation.shares)],
        "upgrades": [asdict(move) for move in allocation.upgrades],
        "downgrades": [asdict(move) for move in allocation.downgrades],
        "other_width": asdict(allocation.other) if allocation.other else None,
        "own_types": asdict(allocation.own_types) if allocation.own_types else None,
    }


def _show_moves(title: str, moves: "Sequence[TypeChange]", unit: str, scale: float) -> None:
    if not moves:
        return
    rows = [
        (
            move.tensor.removesuffix(".weight"),  # or 80 columns would cut it
            move.before,
            move.after,
            f"{'+' if move.nbytes > 0 else '-'}{human_bytes(abs(move.nbytes))}",
            f"{'+' if move.kl > 0 else '-'}{_nats(abs(move.kl))}",
            _nats(abs(move.kl / move.nbytes) * scale),
        )
        for move in moves
    ]
    print(f"\n{title}")
    print_table(("tensor", "from", "to", "bytes", "KLD", f"KLD/{unit}"), rows, numbers_from=3)


def _widths(conversion: "Conversion", allocation: "Allocation") -> str:
    published = conversion.checkpoint.config.moe_intermediate_size

    def described(width: int) -> str:
        return f"{width} wide ({'unpadded' if width == published else 'padded'})"

    chosen, other = described(allocation.plan.expert_width), allocation.other
    if other is None:
        return chosen
    return (
        f"{chosen}; {described(other.expert_width)} it would be {_nats(other.kl)} "
        f"in {human_bytes(other.nbytes)}"
    )


def _layout(allocation: "Allocation") -> str:
    """Say what it costs that experts have one layout in all layers, if they have."""
    own = allocation.own_types
    if own is None:
        return ""
    return (
        f"\nlayout: one type per matrix; with its own type in each layer it would be "
        f"{_nats(own.kl)} in {human_bytes(own.nbytes)}"
    )


def _nats(kl: float) -> str:
    """Format with three significant digits and no exponent."""
    digits = 2 - floor(log10(kl)) if 0 < kl < 100 else 2
    return f"{kl:.{min(max(digits, 0), 12)}f}"
