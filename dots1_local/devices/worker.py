"""A worker: this machine's devices, for another machine's engine to compute on.

The engine's own server does the work, in a process of its own: it ends the process on requests it
cannot make sense of and on errors of a device, and is then started again.
"""

import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dots1_local.devices import rpc_cache, rpc_server
from dots1_local.devices.hardware import physical_cores
from dots1_local.devices.rpc import DEFAULT_PORT, parse_endpoint
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.sizes import human_bytes

__all__ = ["serve"]

_PATIENCE = 10.0  # seconds a client may take to say what it is
_SAVED = re.compile(r"saved to '.*([0-9a-f]{16})'")
_NO_CLIENT = ("Expected HELLO", "HELLO request size mismatch")  # beginnings of the engine's lines


def serve(
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    *,
    threads: int | None = None,
    devices: Sequence[str] = (),
    cache: Path | None = None,
) -> Generator[str, None, None]:
    """Serve the named devices, or all GPUs, or else the CPU; yields what happens, in sentences.

    Goes on until it is closed, one client at a time, and frees the port then. `threads` is for the
    CPU, by default its physical cores. `cache` is a folder to keep weights in.

    Raises:
        UsageError: the address is not this machine's or taken, the cache cannot be written, there
            is no such device, or this build has no RPC.
        Dots1Error: the engine cannot serve.
    """
    address = _address(host, port)
    _check_free(address, host, port)
    cores = os.cpu_count() or 1
    request = {
        "endpoint": f"{address}:{port}",
        "threads": min(threads, cores) if threads else physical_cores(),
        "devices": list(devices),
        "cache": None if cache is None else str(cache),
        "patience": _PATIENCE,
    }
    if cache is not None:
        rpc_cache.open_folder(cache)
    yield from _warnings(address)
    while True:
        yield from _run(request, cache)
        if cache is not None:
            rpc_cache.clean(cache)


def _address(host: str, port: int) -> str:
    parse_endpoint(f"{host}:{port}")
    try:
        return socket.gethostbyname(host)
    except (OSError, UnicodeError):
        raise UsageError(
            f"cannot find the host {host!r}; give an address of this machine"
        ) from None


def _check_free(address: str, host: str, port: int) -> None:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((address, port))
            trial.listen(1)
        except OSError as error:
            raise UsageError(
                f"cannot listen at {host}:{port}: {error.strerror or error}; choose another "
                "--port, or as --host an address of this machine"
            ) from None


def _warnings(address: str) -> Generator[str, None, None]:
    if not ipaddress.ip_address(address).is_loopback:
        yield (
            "warning: whoever reaches this port can read and write this process's memory: there "
            "is no authentication and no encryption. Use a private link, or 127.0.0.1 and an SSH "
            "tunnel."
        )


def _run(request: Mapping[str, Any], cache: Path | None) -> Generator[str, None, None]:
    """Run the server until it dies; what it says, and why it died.

    Raises:
        Dots1Error: it died without a client having had a part in it.
    """
    said: deque[str] = deque(maxlen=16)
    clients = 0
    with subprocess.Popen(
        [sys.executable, "-P", "-m", rpc_server.__name__, json.dumps(request)],
        stdin=subprocess.PIPE,  # it ends when this closes, also where we are killed
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is for us to hear
    ) as server:
        try:
            for line in server.stdout or ():
                if line.startswith("{"):
                    yield from _news(json.loads(line), request)
                elif (saved := _SAVED.search(line)) and cache is not None:
                    if not rpc_cache.keep(cache, saved[1]):
                        yield f"weights are not kept: there is no room in {cache}"
                elif line.startswith(_NO_CLIENT):
                    yield "turned away who is no client, or one of another llama.cpp"
                elif line.startswith("Accepted"):
                    clients += 1
                else:
                    said.append(line.strip())
        finally:
            server.kill()
    reason = _reason(server.wait(), said)
    if not clients:
        raise Dots1Error(f"the engine cannot serve: {reason}")
    yield f"the server died and is started again: {reason}"


def _news(news: Mapping[str, Any], request: Mapping[str, Any]) -> Generator[str, None, None]:
    """What our own process of the server tells."""
    if "error" in news:
        raise UsageError(news["error"])
    for name, description, free, total in news.get("devices", ()):
        # of RAM the engine counts all as free
        memory = "" if free == total else f"{human_bytes(free)} free of "
        yield f"serving {name} ({description.strip()}) with {memory}{human_bytes(total)}"
    if "occupied" in news:
        yield "a client is here" if news["occupied"] else "the client has left"
    if "listening" in news:
        threads, endpoint = request["threads"], request["endpoint"]
        yield f"listening at {endpoint}, {threads} thread{'s' * (threads > 1)}"
        shown = re.sub(r"^0\.0\.0\.0", "ADDRESS", endpoint)
        yield f"use it with dots1 chat FILE.gguf --worker {shown}; Ctrl-C ends it"


def _reason(status: int, said: Sequence[str]) -> str:
    if status == -signal.SIGKILL:
        return "it was killed, maybe for want of memory"
    telling = [line for line in said if "GGML_ASSERT" in line or "what():" in line]
    *_, last = ["it did not say why", *filter(None, said), *telling]
    return last
