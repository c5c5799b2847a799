"""`dots1 plan --routing`: what llama.cpp's cache of experts in VRAM would do for a plan."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dots1_local.cli._output import progress_bar

if TYPE_CHECKING:
    from dots1_local.calibrate.routing import Routing
    from dots1_local.devices.hardware import Hardware
    from dots1_local.placement.expert_cache import CacheForecast
    from dots1_local.placement.model_graph import ModelGraph
    from dots1_local.placement.placement import Placement

__all__ = ["cache_json", "predicted_cache", "show_cache"]


def predicted_cache(
    graph: "ModelGraph", machine: "Hardware", placement: "Placement", routing: str | None
) -> "CacheForecast | str | None":
    """Return what a cache would do, or why there can be none; None without a routing file.

    Raises:
        Dots1Error: the routing is missing, damaged, or that of another model.
    """
    found = _find(graph.path, routing)
    if found is None:
        return None
    from dots1_local.placement.expert_cache import NoExpertCache, predict_cache

    try:
        return predict_cache(graph, machine, placement, found)
    except NoExpertCache as reason:
        return str(reason)


def _find(model: Path, name: str | None) -> "Routing | None":
    """Read the named routing, or else that in the folder which dots1 convert --refine -f made."""
    beside = model.with_name(f"{model.name}.calibration")
    if name is None and not beside.is_dir():
        return None
    from dots1_local.calibrate.manifest import ROUTING, fetch_routing
    from dots1_local.calibrate.routing import load_routing
    from dots1_local.hub import is_hub_id

    if name is None:
        return load_routing(beside) if (beside / ROUTING).exists() else None
    if os.path.lexists(name) or not is_hub_id(name):
        return load_routing(Path(name))
    with progress_bar("routing") as report:
        return load_routing(fetch_routing(name, progress=report))


def cache_json(
    cache: "CacheForecast | str", machine: "Hardware", graph: "ModelGraph"
) -> dict[str, Any]:
    """Return what `predicted_cache` found as plain values; `reason` says why there is no cache."""
    if isinstance(cache, str):
        return {"reason": cache}
    return cache.to_json(machine, str(graph.path))


def show_cache(cache: "CacheForecast | str", machine: "Hardware", graph: "ModelGraph") -> None:
    """Print what the cache would do, and llama-server's command if the cache wins."""
    if isinstance(cache, str):
        print(f"\nNo cache of experts in VRAM: {cache}.")
        return
    decode, prefill = cache.decode, cache.prefill
    sentence = (
        f"{cache.mib:,} MiB of the experts used last, in the place of those that stay in VRAM, "
        f"would hit {cache.hit_rate:.0%} of the choices"
    )
    speeds = (
        f"decode {decode[0]:.2f} → {decode[1]:.2f} tok/s ({decode[1] / decode[0] - 1:+.0%}), "
        f"prefill {prefill[0]:,.0f} → {prefill[1]:,.0f} tok/s"
    )
    if not cache.wins:
        needed = f"it breaks even at {cache.needed:.0%}"
        if cache.needed > 1:
            needed = "no hit rate makes up for the change"
        print(f"\n{sentence}, which does not pay ({needed}): {speeds}.")
        return
    print(f"\n{sentence} (it breaks even at {max(0.0, cache.needed):.0%}): {speeds}.")
    print(f"llama.cpp has this cache from b11480 on{_engine()}:")
    print(cache.command(machine, str(graph.path)))


def _engine() -> str:
    from dots1_local.engine.model_params import has_moe_cache

    if has_moe_cache():
        return ", and so has this llama-cpp-python, though dots1 does not use it"
    return "; this llama-cpp-python is older"
