"""The results of `benchmarks.gpu_offload` as Markdown."""

from collections.abc import Mapping
from typing import Any

from dots1_local.devices.hardware import CPU

__all__ = ["markdown"]

_COLUMNS = ("placement", "device, GB", "driver, GB", "RAM, GB", "prefill, tok/s", "decode, tok/s")


def markdown(results: Mapping[str, Any]) -> str:
    """A paragraph on the machine and the model, and a table of predicted → real."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
    device = results["machine"]["devices"][0]["name"]
    rows += [_row(each, device) for each in results["outcomes"]]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{_machine(results)}\n\n{table}\n"


def _machine(results: Mapping[str, Any]) -> str:
    machine, model = results["machine"], results["model"]
    device = machine["devices"][0]
    share = ""
    if results["device"] == "gpu":
        share = f" (these layers' share of {_gb(results['vram'])} GB for 62)"
    text = (
        f"{device['description']} ({device['name']}, {device['backend']}), held to "
        f"{_gb(results['limit'])} GB of {_gb(results['device_free'])} GB free{share}; "
        f"{machine['cpu']['description']}, {machine['cores']} cores, "
        f"{_gb(machine['cpu']['free'])} GB of RAM free; engine {machine['engine']}. "
        f"Random {model['recipe']} model of {model['num_hidden_layers']} layers, "
        f"{_gb(model['bytes'])} GB, context {results['context']:,}. Predicted → real; speeds at "
        "(tokens of context)."
    )
    if results["device"] == "worker":
        text += (
            " The device is a worker on this machine that stands for a GPU: its memory is real, "
            "but speeds mean little, because both share the processor's cores."
        )
    return text


def _row(outcome: Mapping[str, Any], device: str) -> tuple[str, ...]:
    planned = outcome["planned_bytes"]
    memory = [f"{_gb(planned.get(name))} → {_gb(_real(outcome, name))}" for name in (device, CPU)]
    speeds = [_speeds(outcome, what) for what in ("prefill", "decode")]
    if outcome["error"]:
        speeds = [outcome["error"].replace("|", "\\|"), ""]
    used = _gb(outcome["driver_bytes"].get(device))
    return outcome["name"], memory[0], used, memory[1], *speeds


def _real(outcome: Mapping[str, Any], device: str) -> int | None:
    """What the engine took of a device; None if it failed before, or took nothing."""
    taken = [each["real"] for each in outcome["bytes"] if each["device"] == device]
    return sum(taken) or None


def _speeds(outcome: Mapping[str, Any], what: str) -> str:
    predicted = {each["tokens"]: each[what] for each in outcome["predicted"]}
    return ", ".join(
        f"{_rate(predicted.get(each['tokens']))} → {_rate(each[what])} ({each['tokens']:,})"
        for each in outcome["measured"]
    )


def _gb(nbytes: float | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e9:.2f}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
