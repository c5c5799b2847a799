"""Load an engine by a plan: a given one, one from a file, or one that is made now."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import Hardware
from dots1_local.engine.engine import Engine, open_loadable
from dots1_local.engine.loading import OutOfMemory
from dots1_local.errors import Dots1Error
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.footprint import Usage, footprint, shortfall, usable_bytes
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import (
    Placement,
    check_made_for,
    human_context,
    load_placement,
    stored_placement,
)
from dots1_local.sizes import human_bytes

__all__ = ["load"]

_ATTEMPTS = 4
_MARGIN = 1_000_000_000  # bytes, doubled with each attempt

Notify = Callable[[str], None]


def load(
    path: str | Path,
    placement: Placement | str | Path | None = None,
    *,
    workers: tuple[str, ...] = (),
    notify: Notify = lambda sentence: None,
    chat_template: str | None = None,
    **params: Any,
) -> Engine:
    """Load a model: into RAM, by a placement, by a plan file, or with "auto" by a plan made now.

    "auto" takes the placement that is stored beside the file if it fits this machine and nothing
    else is asked for. Otherwise it plans for this machine and the `workers` (host:port), with the
    speeds that were measured before. If memory runs short, it plans again with less, up to three
    times, and the engine's `warnings` say so. `notify` is called with sentences: what a new plan
    takes and how fast it will be, before it is carried out, and the engine's warnings.

    A `chat_template` takes the place of the file's.
    `params` are those of `EngineParams`, and a `progress`. With a `shared_cache`, `n_sequences` is
    by default what the plan is for. For more sequences than that, the plan's context is divided
    among them unless `n_ctx` is given.

    Raises:
        OutOfMemory: a device has too little memory, with "auto" after all attempts.
        Dots1Error: `Engine.open` or `place` failed in another way.
    """
    if isinstance(placement, str | Path) and placement != "auto":
        placement = load_placement(placement)
    gguf = open_loadable(path, chat_template)
    if isinstance(placement, str | Path):
        engine = _load_planned(gguf, workers, notify, _with_sequences(None, params, notify))
    else:
        params = _with_sequences(placement, params, notify)
        engine = Engine.open(gguf, placement=placement, **params)
    for warning in engine.warnings:
        notify(warning)
    return engine


def _load_planned(
    gguf: GGUFFile, workers: tuple[str, ...], notify: Notify, params: dict[str, Any]
) -> Engine:
    from dots1_local.devices.machine import this_machine

    reserved: dict[str, int] = {}
    warnings: list[str] = []
    for attempt in range(_ATTEMPTS):
        machine = _without(this_machine(workers, measure="cached"), reserved)
        stored = _stored(gguf, machine, params, notify) if not (workers or attempt) else None
        placement = stored or _plan(gguf, machine, params)
        for sentence in _outline(gguf, machine, placement):
            notify(sentence)
        try:
            engine = Engine.open(gguf, placement=placement, **params)
        except OutOfMemory as error:
            if attempt == _ATTEMPTS - 1:
                raise
            margin = _MARGIN << attempt
            excess = _unused(gguf, machine, placement, error.device) + margin
            reserved[error.device] = reserved.get(error.device, 0) + excess
            warnings.append(
                f"{error.reason}; planned again to take at least {human_bytes(margin)} less of it"
            )
        else:
            break
    engine.warnings = (*warnings, *engine.warnings)
    return engine


def _with_sequences(
    placement: Placement | None, params: dict[str, Any], notify: Notify
) -> dict[str, Any]:
    """Complete `n_sequences`, and `n_ctx` if a plan's context has to be divided."""
    shared = placement if params.get("shared_cache") else None
    planned = shared.sequences if shared else 1
    sequences = params.get("n_sequences")
    sequences = planned if sequences is None else sequences
    params = {**params, "n_sequences": sequences}
    if shared and sequences > planned and params.get("n_ctx") is None:
        params["n_ctx"] = max(1, shared.tokens // sequences)
        notify(
            f"the plan's context of {human_context(shared.context, planned)} tokens is divided: "
            f"{human_context(params['n_ctx'], sequences)}"
        )
    return params


def _stored(
    gguf: GGUFFile, machine: Hardware, params: dict[str, Any], notify: Notify
) -> Placement | None:
    """The placement beside the file; None if there is none, or it is not what is needed here."""
    path = stored_placement(gguf.files[0])
    if not path.exists():
        return None
    try:
        placement = load_placement(path)
        check_made_for(placement, gguf)
        asked = {
            "n_ctx": placement.context,
            "n_sequences": placement.sequences,
            "kv_type": placement.kv_type,
            "threads": placement.threads,
        }
        if any(params.get(name) not in (None, value) for name, value in asked.items()):
            return None
        reason = _unfit(gguf, machine, placement)
    except Dots1Error as error:
        reason = str(error)
    if reason:
        notify(f"{path.name} is for another machine or file: {reason}; planned anew")
        return None
    return placement


def _unfit(gguf: GGUFFile, machine: Hardware, placement: Placement) -> str:
    """Say why the machine cannot have this placement; empty if it can."""
    for name in placement.used_devices:
        machine.device(name)
    if placement.threads > machine.cores:
        return f"it uses {placement.threads} threads, and there are {machine.cores} cores"
    lacks = shortfall(ModelGraph.read(gguf), machine, placement)
    short = max(lacks, key=lambda name: lacks[name])
    if lacks[short] > 0 and placement.host_memory != "mapped":
        return f"{short} lacks {human_bytes(lacks[short])}"
    return ""


def _plan(gguf: GGUFFile, machine: Hardware, params: dict[str, Any]) -> Placement:
    from dots1_local.placement.planner import place

    n_ctx = params.get("n_ctx")
    if n_ctx == 0:
        n_ctx = Dots1Config.from_gguf(gguf.keys, gguf.files[0]).max_position_embeddings
    return place(
        gguf,
        machine,
        context=n_ctx,
        sequences=params["n_sequences"],
        kv_type=params.get("kv_type"),
        threads=params.get("threads"),
    )


def _unused(gguf: GGUFFile, machine: Hardware, placement: Placement, device: str) -> int:
    """Bytes that the plan did not use of what seemed free on the device, but was not."""
    used = footprint(ModelGraph.read(gguf), placement).get(device, Usage()).total
    return max(usable_bytes(machine.device(device)) - used, 0)


def _without(machine: Hardware, reserved: dict[str, int]) -> Hardware:
    """The machine with these bytes of its devices taken by something else."""
    cpu, *devices = (
        replace(device, free=max(device.free - reserved.get(device.name, 0), 0))
        for device in (machine.cpu, *machine.devices)
    )
    return replace(machine, cpu=cpu, devices=tuple(devices))


def _outline(gguf: GGUFFile, machine: Hardware, placement: Placement) -> Iterator[str]:
    """Sentences on what the plan will take, how fast it will be, and which memory is short."""
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
        parts.append(f"about {first.decode:.1f} tok/s")
        parts.append(f"{last.decode:.1f} at {last.context:,} tokens")
    yield ", ".join(parts)
    if shortfall := explain_shortfall(graph, machine, placement):
        yield str(shortfall)
