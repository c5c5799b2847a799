"""Workers elsewhere, asked from Python: an address that is wrong costs a sentence.

The engine itself aborts the process where no worker answers, so that is asked first, in what is
needed of its RPC protocol (llama.cpp's `ggml-rpc.cpp`): a request is a byte for the command, the
size as 8 bytes, and the data; an answer is size and data. All numbers are little-endian.
"""

import json
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from queue import Empty, Queue
from threading import Thread
from typing import Self

from dots1_local.devices import rpc_server
from dots1_local.errors import Dots1Error, UsageError

__all__ = [
    "DEFAULT_PORT",
    "WorkerDevice",
    "WorkerInfo",
    "keep_alive",
    "parse_endpoint",
    "probe",
    "probe_all",
]

DEFAULT_PORT = 50052  # llama.cpp's own

_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]{0,252})", re.IGNORECASE)
_MEMORY, _HELLO, _COUNT = 11, 14, 15  # enum rpc_cmd
_CAPABILITIES = bytes(24)  # of connections other than TCP: none
_MOST_DEVICES = 256
_SLOWEST_START = 60  # seconds; drivers take some


@dataclass(frozen=True)
class WorkerDevice:
    """Bytes of a device's memory as its worker tells them; a CPU's are all `free`."""

    free: int
    total: int


@dataclass(frozen=True)
class WorkerInfo:
    """Who answered at `endpoint` (host:port), in which version of the protocol, with what."""

    endpoint: str
    version: str
    devices: tuple[WorkerDevice, ...]


def parse_endpoint(text: str) -> str:
    """A worker's address as the engine wants it, host:port; a port left out is 50052.

    Raises:
        UsageError: no host name or IPv4 address, or no port.
    """
    host, colon, port = text.strip().partition(":")
    if ":" in port or host.startswith("["):
        raise UsageError(
            f"{text!r} is no worker's address: give HOST:PORT, with a name or an IPv4 address "
            "(the engine knows no IPv6 and no URLs)"
        )
    if not _HOST.fullmatch(host):
        raise UsageError(f"{text!r} is no worker's address: give HOST:PORT, as in 10.0.0.2:50052")
    number = port if colon else str(DEFAULT_PORT)
    if not (number.isascii() and number.isdigit() and 0 < int(number[:6]) < 1 << 16):
        raise UsageError(f"{text!r} has no port from 1 to 65535; give HOST:PORT")
    return f"{host.lower()}:{int(number)}"


def probe(endpoint: str, timeout: float = 5.0) -> WorkerInfo:
    """Who answers at `endpoint`; where this returns, the engine may connect.

    It takes at most `timeout` seconds, the first time in a process also the engine's start.

    Raises:
        UsageError: this is no address.
        Dots1Error: nobody answers in time, or not a worker that this engine can work with.
    """
    return probe_all([endpoint], timeout)[0]


def probe_all(endpoints: Iterable[str], timeout: float = 5.0) -> list[WorkerInfo]:
    """Probe workers that are to be used together, each for `timeout` seconds.

    One of two names would wait for ever while the engine uses the other, so that all are held
    here until the last has answered. The same address twice is one worker.

    Raises:
        UsageError: one of them is no address.
        Dots1Error: as `probe` does; or two are the same worker.
    """
    distinct = list(dict.fromkeys(map(parse_endpoint, endpoints)))
    found = []
    with ExitStack() as held:
        for number, endpoint in enumerate(distinct):
            ours = engine_version()
            connection = _Connection.open(endpoint, timeout, beside=distinct[:number])
            found.append(_ask(held.enter_context(connection), endpoint, ours))
    return found


def _ask(worker: "_Connection", endpoint: str, ours: str) -> WorkerInfo:
    version = worker.version()
    if version != ours:
        raise Dots1Error(
            f"the worker at {endpoint} speaks version {version} of the RPC protocol and this "
            f"engine {ours}; install the same llama-cpp-python on both machines"
        )
    (count,) = struct.unpack("<I", worker.ask(_COUNT, b"", 4))
    if not 0 < count <= _MOST_DEVICES:
        raise Dots1Error(f"the worker at {endpoint} says it has {count:,} devices; restart it")
    memory = [worker.ask(_MEMORY, struct.pack("<I", index), 16) for index in range(count)]
    return WorkerInfo(
        endpoint, version, tuple(WorkerDevice(*struct.unpack("<QQ", each)) for each in memory)
    )


def keep_alive(endpoints: Iterable[str]) -> None:
    """Have the engine notice within a minute that a machine it is connected to has vanished.

    By itself it would wait for that one's answer for ever, and hear no Ctrl-C meanwhile.
    """
    ports = {int(endpoint.rpartition(":")[2]) for endpoint in endpoints}
    for found in rpc_server.own_sockets():
        with suppress(OSError):  # one that listens has no peer
            if found.getpeername()[1] in ports:
                rpc_server.keep_alive(found)


@cache
def engine_version() -> str:
    """The version of the protocol that the installed engine speaks; it only says so in print.

    Raises:
        Dots1Error: this build has no RPC, or the engine does not start.
    """
    command = f"from {rpc_server.__name__} import announce; announce()"
    try:
        said = subprocess.run(
            [sys.executable, "-P", "-c", command],
            capture_output=True,
            text=True,
            check=False,
            timeout=_SLOWEST_START,
        )
    except subprocess.TimeoutExpired:
        raise Dots1Error(
            f"the engine did not start within {_SLOWEST_START} s; look after the GPU's driver"
        ) from None
    if found := re.search(r"RPC server v(\d+\.\d+\.\d+)", said.stdout):
        return found[1]
    if said.stdout.startswith("{"):
        raise Dots1Error(json.loads(said.stdout)["error"])
    *_, last = ["it did not say why", *filter(None, said.stderr.split("\n"))]
    raise Dots1Error(f"the engine cannot be asked for its version of the RPC protocol: {last}")


class _Connection:
    """A conversation with what may be a worker, all of it before `deadline`."""

    def __init__(
        self, endpoint: str, sock: socket.socket, deadline: float, beside: Sequence[str]
    ) -> None:
        self._endpoint, self._socket, self._deadline = endpoint, sock, deadline
        self._beside = beside  # workers that are held meanwhile
        self._answered = False

    @classmethod
    def open(cls, endpoint: str, timeout: float, beside: Sequence[str] = ()) -> Self:
        deadline = time.monotonic() + timeout
        host, _, port = endpoint.partition(":")
        address = _within(timeout, lambda: socket.gethostbyname(host))
        if address is None:
            raise Dots1Error(f"cannot find the host {host!r}; check the name, or give its address")
        try:
            sock = socket.create_connection((address, int(port)), _left(deadline))
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
        return cls(endpoint, sock, deadline, beside)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    def version(self) -> str:
        major, minor, patch = self.ask(_HELLO, _CAPABILITIES, 4 + len(_CAPABILITIES))[:3]
        return f"{major}.{minor}.{patch}"

    def ask(self, command: int, data: bytes, size: int) -> bytes:
        """The answer of `size` bytes to a command."""
        try:
            self._socket.settimeout(_left(self._deadline))
            self._socket.sendall(struct.pack("<BQ", command, len(data)) + data)
            (length,) = struct.unpack("<Q", self._receive(8))
            if length != size:
                raise Dots1Error(
                    f"what answers at {self._endpoint} is no worker, or of another version of "
                    "llama-cpp-python; check the port"
                )
            answer = self._receive(size)
        except TimeoutError:
            raise Dots1Error(
                f"{self._endpoint} accepts the connection and does not answer: if that is a "
                "worker, another client is using it (it serves one at a time)" + self._alias()
            ) from None
        except OSError as error:
            raise Dots1Error(f"lost {self._endpoint}: {error.strerror or error}") from None
        self._answered = True
        return answer

    def _receive(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            self._socket.settimeout(_left(self._deadline))
            piece = self._socket.recv(size - len(received))
            if not piece:
                raise Dots1Error(self._closed())
            received += piece
        return bytes(received)

    def _alias(self) -> str:
        return f", or it is {' or '.join(self._beside)} by another name" if self._beside else ""

    def _closed(self) -> str:
        if self._answered:
            return f"the worker at {self._endpoint} is gone; look there for why it ended"
        return (
            f"{self._endpoint} closes the connection: it is no worker, or one of another version "
            "of llama-cpp-python"
        )


def _left(deadline: float) -> float:
    """Seconds, at least a few: 0 would mean not to wait."""
    return max(deadline - time.monotonic(), 0.001)


def _within(seconds: float, work: Callable[[], str]) -> str | None:
    """What `work` returns, None where it fails or takes longer: resolvers know no time-out."""
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
