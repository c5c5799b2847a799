"""What `dots1 plan` prints of a placement: bytes, devices, speeds, and flags for llama.cpp."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dots1_local.cli._output import plural, print_table
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from dots1_local.devices.hardware import Hardware
    from dots1_local.placement.model_graph import ModelGraph
    from dots1_local.placement.placement import Placement
    from dots1_local.placement.speed_model import Forecast
    from dots1_local.verify.correct import Override

__all__ = ["plan_json", "show_plan"]

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


def plan_json(
    graph: "ModelGraph",
    machine: "Hardware",
    placement: "Placement",
    shortfall: Any,
    keys: "Mapping[str, Override] | None" = None,
) -> dict[str, Any]:
    """Return a plan file's content, with what is predicted of it; `keys` are those to override."""
    from dots1_local.files.names import unicode_name
    from dots1_local.placement.llama_args import command_line
    from dots1_local.placement.speed_model import forecast

    predicted = {
        "hardware": machine.name,
        **forecast(graph, machine, placement).to_json(),
        "command": command_line(placement, machine, unicode_name(graph.path), keys),
        "shortfall": None if shortfall is None else str(shortfall),
    }
    return placement.to_json() | {"predicted": predicted}


def show_plan(
    model: Path,
    graph: "ModelGraph",
    machine: "Hardware",
    placement: "Placement",
    keys: "Mapping[str, Override]",
) -> None:
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
    print(command_line(placement, machine, str(graph.path), keys))


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
