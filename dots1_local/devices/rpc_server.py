"""The process that serves devices to other machines: the engine's RPC server, and no more.

`worker.serve` starts it as a module with a REQUEST, and reads its stdout: lines of JSON from here,
all others from the engine. It ends with its standard input, so that it never outlives whoever
started it.
"""

import ctypes
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from ctypes import c_char_p, c_size_t, c_void_p
from threading import Thread
from typing import Any

from dots1_local.devices.backends import BUILD_RPC, DeviceInfo, backend_names, devices
from dots1_local.devices.hardware import CPU
from dots1_local.errors import Dots1Error
from dots1_local.ggml import library

__all__ = ["announce", "keep_alive", "main", "own_sockets"]

_HELLO_SIZE = 33  # bytes of the first request of a client
_KEEP_ALIVE = {  # a machine that gives no sign of life for a minute is gone
    "TCP_KEEPIDLE": 30,
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 3,
}
_USER_TIMEOUT = 60_000  # milliseconds for what was sent and never arrived


def main(request: str) -> None:
    """Serve until killed.

    A request is JSON: endpoint, threads, devices (names; none are the GPUs, or the CPU where there
    are none), cache (a folder or null), patience (seconds a client may take to say what it is).
    """
    asked = json.loads(request)
    Thread(target=_end_with_input, daemon=True).start()
    try:
        chosen = _choose(asked["devices"])
    except Dots1Error as error:
        _say(error=str(error))
        return
    _say(devices=[[each.name, each.description, each.free, each.total] for each in chosen])
    Thread(target=_watch, args=(asked["endpoint"], asked["patience"]), daemon=True).start()
    _start(asked["endpoint"], asked["cache"], asked["threads"], chosen)


def announce() -> None:
    """Make the engine print the version of the protocol it speaks, and serve nothing."""
    try:
        cpu = _choose([CPU])
    except Dots1Error as error:
        _say(error=str(error))
        return
    _start("", None, 1, cpu)  # an endpoint without a port: it introduces itself and gives up


def _start(endpoint: str, cache: str | None, threads: int, served: Sequence[DeviceInfo]) -> None:
    """Returns only where the engine cannot serve, which it has said why."""
    start = library("ggml-rpc").ggml_backend_rpc_start_server
    start.argtypes = [c_char_p, c_char_p, c_size_t, c_size_t, ctypes.POINTER(c_void_p)]
    start.restype = None
    handles = (c_void_p * len(served))(*(device.handle for device in served))
    folder = None if cache is None else os.fsencode(cache)
    start(endpoint.encode(), folder, threads, len(served), handles)


def _choose(names: Sequence[str]) -> list[DeviceInfo]:
    if "RPC" not in backend_names():
        raise Dots1Error(f"this llama-cpp-python has no RPC; build one that has: {BUILD_RPC}")
    here = {device.name: device for device in devices()}
    if unknown := [name for name in names if name not in here]:
        raise Dots1Error(f"there is no device {unknown[0]} to serve; there are {', '.join(here)}")
    gpus = [device for device in here.values() if device.kind in ("gpu", "igpu")]
    return [here[name] for name in dict.fromkeys(names)] or gpus or [here[CPU]]


def _end_with_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def _watch(endpoint: str, patience: float) -> None:
    """Say when the engine listens and has a client, and that none holds the worker for ever.

    A client's machine that vanished is noticed by keep-alive, a client that says nothing here.
    """
    port = int(endpoint.rpartition(":")[2])
    while not any(_listens(found) for found in _sockets(port)):
        time.sleep(0.01)
    _say(listening=True)
    occupied = False
    while True:  # an engine that loads a model comes and goes many times within a second
        time.sleep(min(1.0, patience / 2))
        if any(_is_client(found, patience) for found in _sockets(port)) is not occupied:
            occupied = not occupied
            _say(occupied=occupied)


def own_sockets() -> Iterator[socket.socket]:
    """All internet sockets of this process, the engine's among them, which it hands to nobody."""
    for name in os.listdir("/dev/fd"):
        try:
            copy = os.dup(int(name))
        except OSError:  # closed since
            continue
        try:
            found = socket.socket(fileno=copy)
        except OSError:  # no socket
            os.close(copy)
            continue
        with found:
            if found.family in (socket.AF_INET, socket.AF_INET6):
                yield found


def _sockets(port: int) -> Iterator[socket.socket]:
    """The server's: the listening one and its client's."""
    for found in own_sockets():
        with suppress(OSError):
            if found.getsockname()[1] == port:
                yield found


def keep_alive(found: socket.socket) -> None:
    """Have the system ask for signs of life where nothing else is sent."""
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _listens(found: socket.socket) -> bool:
    """Whether this one does; what it accepts takes over how it asks for signs of life."""
    if not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    keep_alive(found)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT)
    return True


def _is_client(found: socket.socket, patience: float) -> bool:
    """Whether it is a client that has said so; one that does not for so long is shown out."""
    if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    if sys.platform != "linux":
        return True
    info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    (idle,) = struct.unpack_from("I", info, 52)  # tcpi_last_data_recv, milliseconds
    (received,) = struct.unpack_from("Q", info, 128)  # tcpi_bytes_received
    if received < _HELLO_SIZE and idle > 1000 * patience:
        found.shutdown(socket.SHUT_RDWR)
    return bool(received >= _HELLO_SIZE)


def _say(**what: Any) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")  # whole lines, whatever C's stdio holds back


if __name__ == "__main__":
    main(sys.argv[1])
