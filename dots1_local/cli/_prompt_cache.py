"""The options of the prompt cache: sizes, their defaults, and the folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from dots1_local.errors import UsageError
from dots1_local.sizes import parse_size

if TYPE_CHECKING:
    from dots1_local.engine.engine import Engine
    from dots1_local.serve.prompt_cache import PromptCache

__all__ = ["check_sizes", "open_cache"]

_MOST_RAM = 8 << 30


def check_sizes(ram: str | None, folder: Path | None, size: str | None) -> None:
    """Raise a UsageError if the options contradict each other or are no sizes."""
    if size is not None and folder is None:
        raise UsageError("--prompt-cache-size needs --prompt-cache DIR")
    for given in (ram, size):
        if given is not None:
            parse_size(given, minimum=0)


def open_cache(
    engine: "Engine", ram: str | None, folder: Path | None, size: str | None
) -> "PromptCache":
    """Make the cache of earlier prompts, in RAM and, with a folder, on disk.

    Raises:
        Dots1Error: the folder cannot be written.
    """
    from dots1_local.chat.kv_state import kv_binding
    from dots1_local.serve.disk_cache import DiskCache
    from dots1_local.serve.prompt_cache import PromptCache

    disk = None
    if folder is not None:
        nbytes = None if size is None else parse_size(size, minimum=0)
        disk = DiskCache(folder, nbytes, kv_binding(engine))
    return PromptCache(
        engine, _free_ram(engine) if ram is None else parse_size(ram, minimum=0), disk
    )


def _free_ram(engine: "Engine") -> int:
    """Return a quarter of the RAM that is free."""
    from dots1_local.devices.limits import available_ram

    ram = available_ram()
    if ram is None:
        return 0
    # The system counts a mapped file as free, but the model is slow where it is pushed out.
    mapped = engine.placement is None or engine.placement.host_memory == "mapped"
    free = ram.available - (engine.gguf.nbytes if mapped else 0)
    return max(0, min(_MOST_RAM, free // 4))
