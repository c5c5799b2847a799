"""A plan as a person reads it: bytes by device, what is where, speeds, llama.cpp's flags."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dots1_local.cli._output import human_bytes, print_table

if TYPE_CHECKING:
    from dots1_local.devices.hardware import Hardware
    from dots1_local.placement.model_graph import ModelGraph
    from dots1_local.placement.placement import Placement
    from dots1_local.placement.speed_model import Forecast

__all__ = ["show_plan"]

# The classes of bytes that are told apart, and what of a Usage belongs to each.
_CLASSES = {
    "attention": ("attention", "norm"),
    "shared experts": ("shared",),
    "routed experts": ("routed",),
    "other weights": ("dense", "router", "embedding", "head"),
    "KV cache": ("kv",),
    "compute": ("compute", "scratch"),
}
_HELD = {
    "plain": "as it is",
    "pinned": "pinned, which GPUs read at full speed",
    "repacked": "repacked in the order that the CPU's kernels like best",
    "mapped": "the file itself, mapped",
}
_NEVER = 1 << 20  # a batch that no placement reaches


def show_plan(
    model: Path, graph: "ModelGraph", machine: "Hardware", placement: "Placement"
) -> None:
    """Print it."""
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
    for line in (*_whereabouts(graph, placement), *_settings(placement)):
        print(line)
    print()
    _print_speeds(predicted)
    if placement.sequences > 1 and predicted.speeds:
        print("All speeds are those of one answer alone.")
    print("\nThe same with llama.cpp's own programs:")
    print(command_line(placement, machine, str(graph.gguf.files[0])))


def _print_bytes(predicted: "Forecast") -> None:
    usage = predicted.usage
    rows = [
        (label, *(human_bytes(sum(getattr(used, n) for n in names)) for used in usage.values()))
        for label, names in _CLASSES.items()
    ]
    rows.append(("margin left", *(_signed(predicted.free[name]) for name in usage)))
    total = ("in all", *(human_bytes(usage[n].total + predicted.free[n]) for n in usage))
    header = ("", *("RAM" if name == "CPU" else name for name in usage))
    print_table(header, rows, numbers_from=1, total=total)


def _signed(nbytes: int) -> str:
    return human_bytes(nbytes) if nbytes >= 0 else f"-{human_bytes(-nbytes)}"


def _whereabouts(graph: "ModelGraph", placement: "Placement") -> Iterable[str]:
    """Which layers' weights, KV cache and routed experts are where."""
    from dots1_local.placement.model_graph import is_routed

    where: dict[str, dict[str, list[int]]] = {"layers": {}, "KV cache": {}, "routed experts": {}}
    partly: dict[int, dict[str, str]] = {}
    for step in graph.ops:
        if step.part == "attn_q":
            device = placement.device_of(step.name)
            where["layers"].setdefault(device, []).append(step.layer)
            kv = placement.device_of_layer(step.layer)
            where["KV cache"].setdefault(kv, []).append(step.layer)
        elif is_routed(step.part):
            partly.setdefault(step.layer, {})[step.part] = placement.device_of(step.name)
    for layer, devices in partly.items():
        if len(set(devices.values())) == 1:
            where["routed experts"].setdefault(next(iter(devices.values())), []).append(layer)
    for label, devices_of in where.items():
        yield f"{label:16}{_by_device(devices_of)}"
    for layer, devices in partly.items():
        if len(set(devices.values())) > 1:
            parts = (f"{part} on {_name(device)}" for part, device in devices.items())
            yield f"{f'in layer {layer}':16}{', '.join(parts)}"


def _by_device(layers: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{_ranges(each)} on {_name(name)}" for name, each in layers.items())


def _name(device: str) -> str:
    return "RAM" if device == "CPU" else device


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2 5'."""
    text = []
    for number in numbers:
        if number - 1 not in numbers:
            last = number
            while last + 1 in numbers:
                last += 1
            text.append(str(number) if last == number else f"{number}-{last}")
    return " ".join(text)


def _settings(placement: "Placement") -> Iterable[str]:
    flash = "flash attention" if placement.flash_attention else "no flash attention"
    yield f"{'KV type':16}{placement.kv_type}, {flash}"
    threads = f"{placement.threads} thread{'s' * (placement.threads != 1)}"
    yield f"{'ubatch':16}{placement.ubatch:,} tokens, {threads}"
    held = _HELD[placement.host_memory]
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
    rows = [
        (f"{at.context:,}", _speed(at.prefill), f"{at.decode:.2f}", f"{at.cost:.3f}")
        for at in predicted.speeds
    ]
    header = ("context", "prefill tok/s", "decode tok/s", "1,000 more cost tok/s")
    print_table(header, rows, numbers_from=0)
    print(f"Prefill is of a prompt of {predicted.prompt:,} token{'s' * (predicted.prompt != 1)}.")


def _speed(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"
