"""What is where: which device holds which parts of the model, as planned and as allocated."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import CPU, Hardware
from dots1_local.devices.machine import started_machine
from dots1_local.engine.engine import Engine
from dots1_local.engine.log import Allocated, Report
from dots1_local.errors import Dots1Error
from dots1_local.files.gguf import role_of
from dots1_local.placement.footprint import Usage, footprint, kv_bytes
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import Placement
from dots1_local.placement.speed_model import forecast

__all__ = ["engine_placement", "placement_report"]

_log = logging.getLogger(__name__)
_Part = tuple[int | None, str, str]  # layer, role and device


def engine_placement(engine: Engine) -> dict[str, Any] | None:
    """Return the report of an engine that computes nothing at the moment.

    None if its devices cannot be described, which is no reason not to serve.
    """
    try:
        return _engine_placement(engine)
    except Dots1Error:
        _log.exception("the placement is not known")
        return None


def _engine_placement(engine: Engine) -> dict[str, Any]:
    given = engine.placement
    placement = engine.params.applied_to(given) if given else _all_in_ram(engine)
    graph = ModelGraph.read(engine.gguf)
    with engine.call():
        machine = started_machine()
    usage = engine.predicted or footprint(graph, placement, n_outputs=engine.params.n_outputs)
    machine = _before_loading(machine, engine.report, mapped=placement.host_memory == "mapped")
    return placement_report(graph, machine, placement, usage, engine.report)


def placement_report(
    graph: ModelGraph,
    machine: Hardware,
    placement: Placement,
    usage: Mapping[str, Usage],
    report: Report | None,
) -> dict[str, Any]:
    """Return the answer of GET /v1/placement, as plain values.

    All sizes are in bytes. The memory of `machine` is what was free before the model was loaded.
    `usage` is what was planned for each device, and `report` what the engine allocated, if known.
    """
    predicted = forecast(graph, machine, placement)
    return {
        "object": "placement",
        "model": {"file": graph.path.name, "bytes": graph.nbytes, "blocks": placement.blocks},
        "context": placement.context,
        "sequences": placement.sequences,
        "kv_type": placement.kv_type,
        "ubatch": placement.ubatch,
        "threads": placement.threads,
        "host_memory": placement.host_memory,
        "machine": machine.name,
        "devices": [
            {
                "name": name,
                "description": machine.device(name).description,
                "backend": machine.device(name).backend,
                "worker": machine.device(name).worker,
                "total": machine.device(name).total,
                "free": machine.device(name).free,
                "planned": asdict(used),
                "allocated": None if report is None else asdict(report.get(name, Allocated())),
            }
            for name, used in usage.items()
        ],
        "parts": _parts(graph, placement),
        "predicted": {
            "prompt": predicted.prompt,
            "speeds": [asdict(speed) for speed in predicted.speeds],
        },
    }


def _parts(graph: ModelGraph, placement: Placement) -> list[dict[str, Any]]:
    """Return the weights and KV cache of each layer by role and device.

    The embedding has no layer, and the output layer is the last one.
    """
    layers = {each.name: n for n, layer in enumerate(graph.layers) for each in layer.values()}
    sizes: defaultdict[_Part, int] = defaultdict(int)
    types: defaultdict[_Part, dict[str, None]] = defaultdict(dict)
    for tensor in graph.tensors:
        role = role_of(tensor.name) or "norm"
        place: _Part = layers.get(tensor.name), role, placement.device_of(tensor.name)
        sizes[place] += tensor.nbytes
        types[place][tensor.type] = None
    kv = kv_bytes(graph.config, placement.tokens, placement.kv_type) // placement.blocks
    for layer in range(placement.blocks):
        place = layer, "kv", placement.device_of_layer(layer)
        sizes[place], types[place] = kv, {placement.kv_type: None}
    return [
        {"layer": layer, "role": role, "device": device, "bytes": size, "types": [*types[place]]}
        for place, size in sizes.items()
        for layer, role, device in [place]
    ]


def _all_in_ram(engine: Engine) -> Placement:
    """Return what the engine does without a placement."""
    params, gguf = engine.params, engine.gguf
    config = Dots1Config.from_gguf(gguf.keys, gguf.files[0])
    return Placement(
        model=gguf.files[0].name,
        model_bytes=gguf.nbytes,
        blocks=config.num_hidden_layers,
        context=params.n_ctx,
        kv_type=params.kv_type,
        flash_attention=params.flash_attention is not False,
        ubatch=params.n_ubatch,
        threads=params.threads,
        host_memory="mapped",
        sequences=params.n_sequences if params.shared_cache else 1,
    )


def _before_loading(machine: Hardware, report: Report, *, mapped: bool) -> Hardware:
    """Return the machine with the memory free that the engine has allocated since."""

    def freed(name: str, free: int, total: int) -> int:
        allocated = report.get(name, Allocated())
        # The system counts the pages of a mapped file as free.
        taken = allocated.total - (allocated.weights if mapped and name == CPU else 0)
        return min(free + taken, total)

    cpu, *devices = (
        replace(each, free=freed(each.name, each.free, each.total))
        for each in (machine.cpu, *machine.devices)
    )
    return replace(machine, cpu=cpu, devices=tuple(devices))
