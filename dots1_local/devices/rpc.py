"""The addresses of workers, and whether a worker answers there.

The engine aborts the process if no worker answers. So the address is probed first, in the part of
llama.cpp's RPC protocol (`ggml-rpc.cpp`) that this needs: a request is a byte for the command, the
size as 8 bytes, and the data; an answer is the size and the data. Numbers are little-endian.
"""

import os
import re
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from queue import Empty, Queue
from threading import Thread
from typing import Self

from dots1_local.devices import backends
from dots1_local.devices.hardware import CPU
from dots1_local.devices.liveness import answering
from dots1_local.errors import Dots1Error, UsageError

__all__ = ["DEFAULT_PORT", "announce", "keep_alive", "parse_endpoint", "probe"]

DEFAULT_PORT = 50052  # llama.cpp's own

_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]{0,252})", re.IGNORECASE)
_HELLO, _COUNT = 14, 15  # enum rpc_cmd
_CAPABILITIES = bytes(24)  # no connections other than TCP
_MAX_DEVICES = 256
_MAX_START = 60  # seconds; GPU drivers take some
# A minute in all, in seconds and, for data whose receipt is not confirmed, in milliseconds.
_KEEP_ALIVE = {
    "TCP_KEEPIDLE": 30,
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 60_000,
}


def parse_endpoint(text: str) -> str:
    """A worker's address as the engine takes it, host:port; the default port is 50052.

    Raises:
        UsageError: the text is not a host name or IPv4 address with a valid port.
    """
    host, colon, port = text.strip().partition(":")
    if ":" in port or host.startswith("["):
        raise UsageError(
            f"{text!r} is not a worker's address: give HOST:PORT, with a name or an IPv4 address "
            "(the engine supports neither IPv6 nor URLs)"
        )
    if not _HOST.fullmatch(host):
        raise UsageError(
            f"{text!r} is not a worker's address: give HOST:PORT, such as 10.0.0.2:50052"
        )
    number = port if colon else str(DEFAULT_PORT)
    if not (number.isascii() and number.isdigit() and 0 < int(number[:6]) < 1 << 16):
        raise UsageError(f"{text!r} has no port from 1 to 65535; give HOST:PORT")
    return f"{host.lower()}:{int(number)}"


def probe(endpoints: Iterable[str], timeout: float = 5.0) -> None:
    """Check that workers answer at these endpoints; if this returns, the engine may connect.

    It takes at most `timeout` seconds for each, and the first time in a process also the engine's
    start. All connections stay open until the last worker has answered: a worker serves one client
    at a time, so one that is listed by two names is found out here and does not hang the engine. An
    address that is given twice counts once.

    Raises:
        UsageError: one of them is not an address.
        Dots1Error: nobody answers in time, it is not a worker that this engine can work with, or
            two addresses are the same worker.
    """
    distinct = list(dict.fromkeys(map(parse_endpoint, endpoints)))
    answering(distinct)  # before it is used, so that it is known if it freezes from now on
    with ExitStack() as stack:
        for number, endpoint in enumerate(distinct):
            ours = engine_version()
            worker = _WorkerConnection(endpoint, timeout, others=distinct[:number])
            _check(stack.enter_context(worker), endpoint, ours)


def _check(worker: "_WorkerConnection", endpoint: str, ours: str) -> None:
    major, minor, patch = worker.ask(_HELLO, _CAPABILITIES, 4 + len(_CAPABILITIES))[:3]
    if (version := f"{major}.{minor}.{patch}") != ours:
        raise Dots1Error(
            f"the worker at {endpoint} speaks version {version} of the RPC protocol and this "
            f"engine {ours}; install the same llama-cpp-python on both machines"
        )
    (count,) = struct.unpack("<I", worker.ask(_COUNT, b"", 4))
    if not 0 < count <= _MAX_DEVICES:
        raise Dots1Error(f"the worker at {endpoint} says it has {count:,} devices; restart it")


def keep_alive(ports: Collection[int]) -> None:
    """Have the kernel end connections to or from these ports when the other machine vanishes.

    It notices within about a minute. Without this the engine waits for ever, deaf to Ctrl-C. The
    engine does not give its sockets away, so this goes through all of the process.
    """
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # closed since, or a listening socket, which has no peer
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as found:
                    _keep_alive(found, ports)


def _keep_alive(found: socket.socket, ports: Collection[int]) -> None:
    if found.family not in (socket.AF_INET, socket.AF_INET6):
        return
    if found.getsockname()[1] in ports or found.getpeername()[1] in ports:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@cache
def engine_version() -> str:
    """The version of the RPC protocol that the installed engine speaks, which it only prints.

    Raises:
        Dots1Error: this build has no RPC, or the engine does not start.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", f"from {__name__} import announce; announce()"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_MAX_START,
        )
    except subprocess.TimeoutExpired:
        raise Dots1Error(
            f"the engine did not start within {_MAX_START} s; check the GPU's driver"
        ) from None
    if found := re.search(r"RPC server v(\d+\.\d+\.\d+)", done.stdout):
        return found[1]
    *_, last = ["it did not say why", *filter(None, done.stderr.split("\n"))]
    raise Dots1Error(f"cannot find out the engine's version of the RPC protocol: {last}")


def announce() -> None:
    """Have the engine print the version of the RPC protocol, and exit with the error if it fails.

    The endpoint has no port, so the server introduces itself and gives up.
    """
    try:
        backends.check_rpc()
    except Dots1Error as error:
        sys.exit(str(error))
    backends.serve_rpc("", [device for device in backends.devices() if device.name == CPU])


class _WorkerConnection:
    """A connection to what may be a worker, with one `deadline` for everything."""

    def __init__(self, endpoint: str, timeout: float, others: Sequence[str]) -> None:
        self._endpoint, self._others = endpoint, others  # this process is connected to the others
        self._deadline, self._answered = time.monotonic() + timeout, False
        host, _, port = endpoint.partition(":")
        address = _within(timeout, lambda: socket.gethostbyname(host))
        if address is None:
            raise Dots1Error(f"cannot find the host {host!r}; check the name, or give its address")
        try:
            self._socket = socket.create_connection((address, int(port)), self._left())
        except ConnectionRefusedError:
            raise Dots1Error(
                f"nobody listens at {endpoint}; start dots1 worker there, or check the port"
            ) from None
        except TimeoutError:
            raise Dots1Error(
                f"{host} does not answer at port {port} within {timeout:g} s; check the address, "
                "its firewall, and whether others use that worker"
            ) from None
        except OSError as error:
            raise Dots1Error(f"cannot reach {endpoint}: {error.strerror or error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    def ask(self, command: int, data: bytes, size: int) -> bytes:
        """The answer of `size` bytes to a command."""
        try:
            self._socket.settimeout(self._left())
            self._socket.sendall(struct.pack("<BQ", command, len(data)) + data)
            (length,) = struct.unpack("<Q", self._receive(8))
            if length != size:
                raise Dots1Error(
                    f"{self._endpoint} is not a worker, or has another version of "
                    "llama-cpp-python; check the port"
                )
            answer = self._receive(size)
        except TimeoutError:
            raise Dots1Error(self._silent()) from None
        except OSError as error:
            raise Dots1Error(f"lost {self._endpoint}: {error.strerror or error}") from None
        self._answered = True
        return answer

    def _receive(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            self._socket.settimeout(self._left())
            data = self._socket.recv(size - len(received))
            if not data:
                raise Dots1Error(self._closed())
            received += data
        return bytes(received)

    def _left(self) -> float:
        """Seconds until the deadline, at least a millisecond: 0 would mean not to wait."""
        return max(self._deadline - time.monotonic(), 0.001)

    def _silent(self) -> str:
        others = f", or it is the same as {' or '.join(self._others)}" if self._others else ""
        return (
            f"{self._endpoint} accepts the connection and does not answer: if it is a worker, "
            "another client is using it (it serves one at a time; start it again if none is)"
            + others
        )

    def _closed(self) -> str:
        if self._answered:
            return f"the worker at {self._endpoint} is gone; look there for why it ended"
        return (
            f"{self._endpoint} closes the connection: it is not a worker, or has another version "
            "of llama-cpp-python"
        )


def _within(seconds: float, work: Callable[[], str]) -> str | None:
    """What `work` returns, or None if it fails or takes longer; resolvers have no time-out."""
    results: Queue[str | None] = Queue()

    def run() -> None:
        try:
            results.put(work())
        except (OSError, UnicodeError):
            results.put(None)

    Thread(target=run, daemon=True).start()
    try:
        return results.get(timeout=seconds)
    except Empty:
        return None
