"""`dots1 worker`: lend this machine's devices to a model that another one runs."""

import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from dots1_local.cli._output import Threads, notice

__all__ = ["worker"]


def worker(
    host: Annotated[
        str, typer.Option("--host", help="Listen at this address; others than loopback are open.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Listen at this port.")
    ] = 50052,
    threads: Threads = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", help="Serve this; all GPUs or else the CPU if unset. Repeatable."),
    ] = None,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache", help="Keep weights in $XDG_CACHE_HOME/dots1/rpc; they are sent only once."
        ),
    ] = False,
) -> None:
    """Lend this machine's devices to a model on another; Ctrl-C ends it.

    There is no authentication: use it over a private link or an SSH tunnel only.

    dots1 worker --port 50052

    dots1 chat dots1-Q4_K_M.gguf --worker 127.0.0.1:50052
    """
    from dots1_local.devices.worker import serve

    signal.signal(signal.SIGTERM, _terminate)
    folder = _cache_folder() if cache else None
    events = serve(host, port, threads=threads, devices=device or (), cache=folder)
    try:
        with closing(events):
            for event in events:
                notice(event)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _terminate(number: int, frame: Any) -> None:
    """End as the signal would have it, but by way of what frees the port."""
    raise SystemExit(128 + number)


def _cache_folder() -> Path:
    """The person's own, by the XDG rules."""
    from dots1_local.errors import UsageError

    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return Path(cache if os.path.isabs(cache) else "~/.cache").expanduser() / "dots1" / "rpc"
    except RuntimeError:
        raise UsageError("there is no home folder to keep weights in; set XDG_CACHE_HOME") from None
