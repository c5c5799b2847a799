"""`dots1 worker`: lend this machine's devices to a model that another machine runs."""

import signal
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from dots1_local.cli._options import Threads, exit_on_interrupt, flag, option, verb
from dots1_local.cli._output import notice
from dots1_local.errors import UsageError
from dots1_local.files.user_folder import user_folder

__all__ = ["WorkerOptions", "worker"]


@dataclass(frozen=True, eq=False, repr=False)
class WorkerOptions:
    host: str = option(
        "Listen at this address; every address but a loopback one is open to others.",
        value="127.0.0.1",
    )
    port: int = option("Listen at this port.", value=50052, min=1, max=65535)
    threads: Threads = None
    device: list[str] | None = option(
        "Lend this device; repeatable.", default="all GPUs, or else the CPU"
    )
    cache: bool = flag(
        "Keep weights in $XDG_CACHE_HOME/dots1/rpc, so that they are sent only once.", "--cache"
    )


@verb
def worker(options: WorkerOptions) -> None:
    """Lend this machine's devices to a model on another machine; Ctrl-C ends it.

    There is no authentication: use a worker over a private link or an SSH tunnel only.

    dots1 worker --port 50052

    dots1 chat dots1-Q4_K_M.gguf --worker 127.0.0.1:50052
    """
    from dots1_local.devices.worker import serve

    signal.signal(signal.SIGTERM, _terminate)
    try:
        folder = user_folder("cache") / "rpc" if options.cache else None
    except RuntimeError:
        raise UsageError("there is no home folder to keep weights in; set XDG_CACHE_HOME") from None
    events = serve(
        options.host,
        options.port,
        threads=options.threads,
        devices=options.device or (),
        cache=folder,
    )
    with exit_on_interrupt(), closing(events):
        for event in events:
            notice(event)


def _terminate(number: int, frame: Any) -> None:
    """Exit as the signal would, but by an exception, so that the port is freed."""
    raise SystemExit(128 + number)
