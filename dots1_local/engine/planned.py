"""An engine by a plan: one at hand, one from a file, or one made now for this machine."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dots1_local.devices.hardware import Hardware
from dots1_local.engine.engine import Engine
from dots1_local.engine.loading import OutOfMemory
from dots1_local.engine.model_params import trained_for
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.footprint import Usage, footprint
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import Placement, human_context, load_placement
from dots1_local.sizes import human_bytes
from dots1_local.verify import check_loadable

__all__ = ["load"]

_ATTEMPTS = 4
_LESS = 1_000_000_000  # bytes, doubled with each attempt


def load(
    path: str | Path,
    placement: Placement | str | Path | None = None,
    *,
    workers: tuple[str, ...] = (),
    tell: Callable[[str], None] = lambda sentence: None,
    **options: Any,
) -> Engine:
    """Load a model: all in RAM, by a placement or the plan file it is in, or by "auto".

    That plans for this machine and the `workers` (host:port), as measured before, and where memory
    turns out to be short three times more with less of it; the engine's `warnings` tell of that.
    `tell` hears what such a plan takes and how fast it will be, before it is carried out, and the
    engine's warnings.
    `options` are those of `Engine.open`. With a `shared_cache` and no `n_sequences` there are as
    many as the plan is for; for more of them its context is shared out, unless `n_ctx` says what
    each may have, and `tell` hears of that.

    Raises:
        OutOfMemory: a device has too little, for "auto" after all attempts.
        Dots1Error: whatever else `Engine.open` and `place` raise.
    """
    if placement == "auto":
        engine = _load_planned(path, workers, tell, options)
    else:
        known = load_placement(placement) if isinstance(placement, str | Path) else placement
        engine = Engine.open(path, placement=known, **_shared_out(known, options, tell))
    for warning in engine.warnings:
        tell(warning)
    return engine


def _load_planned(
    path: str | Path, workers: tuple[str, ...], tell: Callable[[str], None], options: dict[str, Any]
) -> Engine:
    from dots1_local.devices.machine import this_machine

    gguf = GGUFFile.open(path)
    check_loadable(gguf)
    options = _shared_out(None, options, tell)
    reserved: dict[str, int] = {}
    warnings: list[str] = []
    for attempt in range(_ATTEMPTS):
        machine = this_machine(workers, measure="cached")
        machine = _without(machine, reserved)
        placement = _plan(gguf, machine, options)
        for sentence in _outline(gguf, machine, placement):
            tell(sentence)
        try:
            engine = Engine.open(path, placement=placement, **options)
        except OutOfMemory as error:
            if attempt == _ATTEMPTS - 1:
                raise
            less = _LESS << attempt
            excess = _unused(gguf, machine, placement, error.device) + less
            reserved[error.device] = reserved.get(error.device, 0) + excess
            warnings.append(
                f"{error.reason}; planned again to take at least {human_bytes(less)} less of it"
            )
        else:
            break
    engine.warnings = (*warnings, *engine.warnings)
    return engine


def _shared_out(
    known: Placement | None, options: dict[str, Any], tell: Callable[[str], None]
) -> dict[str, Any]:
    """The options with numbers of sequences and of tokens for each, as the placement has them."""
    shared = known if options.get("shared_cache") else None
    planned = shared.sequences if shared else 1
    asked = options.get("n_sequences")
    sequences = planned if asked is None else asked
    options = {**options, "n_sequences": sequences}
    if shared and sequences > planned and options.get("n_ctx") is None:
        share = max(1, shared.tokens // sequences)
        tell(
            f"the plan's context of {human_context(shared.context, planned)} tokens is shared out: "
            f"{human_context(share, sequences)}"
        )
        options["n_ctx"] = share
    return options


def _plan(gguf: GGUFFile, machine: Hardware, options: dict[str, Any]) -> Placement:
    from dots1_local.placement.planner import place

    n_ctx = options.get("n_ctx")
    return place(
        gguf,
        machine,
        context=trained_for(gguf) if n_ctx == 0 else n_ctx,
        sequences=options["n_sequences"],
        kv_type=options.get("kv_type"),
        threads=options.get("threads"),
    )


def _unused(gguf: GGUFFile, machine: Hardware, placement: Placement, device: str) -> int:
    """Bytes that the plan left of what it might have taken, and that were never there."""
    from dots1_local.placement.footprint import usable_bytes

    taken = footprint(ModelGraph.read(gguf), placement).get(device, Usage()).total
    return max(usable_bytes(machine.device(device)) - taken, 0)


def _without(machine: Hardware, reserved: dict[str, int]) -> Hardware:
    """The machine as it would be with so many bytes of its devices taken by something else."""
    cpu, *devices = (
        replace(device, free=max(device.free - reserved.get(device.name, 0), 0))
        for device in (machine.cpu, *machine.devices)
    )
    return replace(machine, cpu=cpu, devices=tuple(devices))


def _outline(gguf: GGUFFile, machine: Hardware, placement: Placement) -> Iterator[str]:
    """What it will take and how fast it will be, and what is short."""
    from dots1_local.placement.alternatives import explain_shortfall
    from dots1_local.placement.speed_model import forecast

    graph = ModelGraph.read(gguf)
    predicted = forecast(graph, machine, placement)
    parts = [
        f"{name} {human_bytes(used.total)} of {human_bytes(used.total + predicted.free[name])}"
        for name, used in predicted.usage.items()
    ]
    if predicted.speeds:
        first, last = predicted.speeds[0], predicted.speeds[-1]
        parts += [
            f"about {first.decode:.1f} tok/s",
            f"{last.decode:.1f} at {last.context:,} tokens",
        ]
    yield ", ".join(parts)
    if shortfall := explain_shortfall(graph, machine, placement):
        yield str(shortfall)
