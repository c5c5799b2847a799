"""dots1-local runs rednote's dots.llm1 on hardware people own.

This is the public API. A name is loaded at its first use, so importing the package is free:

    from dots1_local import convert_checkpoint, load, perplexity, Session

    convert_checkpoint("dots.llm1.inst", "dots.gguf", "DQ4")
    with load("dots.gguf", placement="auto") as engine, Session(engine) as session:
        print("".join(session.ask("Why is the sky blue?")))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dots1_local.architecture import Dots1Config, inventory
    from dots1_local.chat.remote import RemoteSession
    from dots1_local.chat.sampling import Sampling
    from dots1_local.chat.session import Session
    from dots1_local.convert import Budget, Conversion, convert_checkpoint
    from dots1_local.devices.hardware import Hardware
    from dots1_local.devices.machine import find_hardware, this_machine
    from dots1_local.engine.engine import Engine
    from dots1_local.engine.planned import load
    from dots1_local.errors import Dots1Error
    from dots1_local.evaluate.kl_divergence import kl_divergence
    from dots1_local.evaluate.perplexity import perplexity
    from dots1_local.export import export_checkpoint
    from dots1_local.files.checkpoint import Checkpoint
    from dots1_local.files.gguf import GGUFFile
    from dots1_local.hub import open_hub
    from dots1_local.placement.placement import Placement, load_placement
    from dots1_local.placement.planner import place
    from dots1_local.quant.plan import QuantPlan
    from dots1_local.verify import verify_gguf

__version__ = "0.1.0"
__all__ = [
    "Budget", "Checkpoint", "Conversion", "Dots1Config", "Dots1Error", "Engine", "GGUFFile",
    "Hardware", "Placement", "QuantPlan", "RemoteSession", "Sampling", "Session",
    "convert_checkpoint", "export_checkpoint", "find_hardware", "inventory", "kl_divergence",
    "load", "load_placement", "open_hub", "perplexity", "place", "this_machine", "verify_gguf",
]  # fmt: skip

_NAMES_OF = {
    "architecture": ("Dots1Config", "inventory"),
    "chat.remote": ("RemoteSession",),
    "chat.sampling": ("Sampling",),
    "chat.session": ("Session",),
    "convert": ("Budget", "Conversion", "convert_checkpoint"),
    "devices.hardware": ("Hardware",),
    "devices.machine": ("find_hardware", "this_machine"),
    "engine.engine": ("Engine",),
    "engine.planned": ("load",),
    "errors": ("Dots1Error",),
    "evaluate.kl_divergence": ("kl_divergence",),
    "evaluate.perplexity": ("perplexity",),
    "export": ("export_checkpoint",),
    "files.checkpoint": ("Checkpoint",),
    "files.gguf": ("GGUFFile",),
    "hub": ("open_hub",),
    "placement.placement": ("Placement", "load_placement"),
    "placement.planner": ("place",),
    "quant.plan": ("QuantPlan",),
    "verify": ("verify_gguf",),
}


def __getattr__(name: str) -> Any:
    for module, names in _NAMES_OF.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
