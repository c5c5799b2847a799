"""A worker serves this machine's devices to another machine's engine.

llama.cpp's RPC server does the work in a child process, `python -m dots1_local.devices.worker
REQUEST`. That server ends its process on requests that it cannot parse and on errors of a device;
`serve` then starts it again.

With a cache the server writes every tensor above 10 MiB to a file named after a hash of its
content, and later trusts any file of that name. A file that a kill or a full disk cut short would
silently become a model's weights. So `serve` makes each complete file read-only and deletes all
others before it starts a server.
"""

import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from threading import Thread
from typing import Any

from dots1_local.devices import backends
from dots1_local.devices.backends import DeviceInfo
from dots1_local.devices.hardware import CPU
from dots1_local.devices.limits import physical_cores
from dots1_local.devices.liveness import answer_questions
from dots1_local.devices.rpc import DEFAULT_PORT, keep_alive, parse_endpoint
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.sizes import human_bytes

__all__ = ["keep_weights", "open_cache", "serve"]

# Lines that llama.cpp's server logs.
_SAVED = re.compile(r"saved to '.*([0-9a-f]{16})'")
_REFUSED = ("Expected HELLO", "HELLO request size mismatch")
_ROUTINE = ("{", "Accepted client", "Client connection closed")
_READ_ONLY = 0o400
_ROOM = 1 << 20  # bytes


def serve(
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    *,
    threads: int | None = None,
    devices: Sequence[str] = (),
    cache: Path | None = None,
) -> Generator[str, None, None]:
    """Serve the named devices, by default all GPUs or else the CPU, and yield events as sentences.

    The server takes one client at a time and runs until the generator is closed, which frees the
    port. `threads` is for the CPU, by default its physical cores. `cache` is a folder to keep
    weights in.

    Raises:
        UsageError: the address is not this machine's or is taken, the cache cannot be written, a
            device does not exist, or this build has no RPC.
        Dots1Error: the server cannot start.
    """
    address = _free_address(host, port)
    request = {
        "endpoint": f"{address}:{port}",
        "threads": min(threads, os.cpu_count() or 1) if threads else physical_cores(),
        "devices": list(devices),
        "cache": None if cache is None else str(cache),
    }
    if cache is not None:
        open_cache(cache)
    if not ipaddress.ip_address(address).is_loopback:
        yield (
            "warning: there is no authentication and no encryption, and anyone who reaches this "
            "port can read and write this process's memory. Use a private link, or 127.0.0.1 and "
            "an SSH tunnel."
        )
    while True:
        yield from _run_server(request, cache)
        if cache is not None:
            _delete_incomplete(cache)


def open_cache(folder: Path) -> None:
    """Make the folder, for its owner only, and delete files that may be incomplete.

    Raises:
        UsageError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_room(folder)
        _delete_incomplete(folder)
    except OSError as error:
        raise UsageError(f"cannot keep weights in {folder}: {error.strerror or error}") from None


def _delete_incomplete(folder: Path) -> None:
    """Delete files that may be incomplete; no server may be running."""
    for file in folder.iterdir():
        is_weights = re.fullmatch(r"[0-9a-f]{16}", file.name)
        if is_weights and file.stat().st_mode & 0o777 != _READ_ONLY:
            file.unlink(missing_ok=True)


def keep_weights(file: Path) -> bool:
    """Keep a file that the server has just written, unless the disk is full; return whether."""
    try:
        _check_room(file.parent)
        file.chmod(_READ_ONLY)
    except OSError:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        return False
    return True


def _check_room(folder: Path) -> None:
    """Raise OSError if the disk is full, which the server does not notice."""
    with TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, _ROOM)


def _free_address(host: str, port: int) -> str:
    """The IPv4 address of `host`, at which nobody listens yet."""
    parse_endpoint(f"{host}:{port}")
    try:
        address = socket.gethostbyname(host)
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(1)
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"cannot listen at {host}:{port}: {getattr(error, 'strerror', error)}; choose another "
            "--port, or an address of this machine as --host"
        ) from None
    return address


def _run_server(request: Mapping[str, Any], cache: Path | None) -> Generator[str, None, None]:
    """Start the server and yield events until it dies, the last one being why it died.

    Raises:
        Dots1Error: the server died before it listened.
    """
    log: deque[str] = deque(maxlen=16)
    listened = False
    with _server_process(request) as process:
        for line in process.stdout or ():
            log.append(line.strip())
            listened = listened or "listening" in line
            yield from _events(line, cache)
        reason = _reason(process.wait(), log)
    if not listened:
        raise Dots1Error(f"the server cannot start: {reason}")
    yield f"the server died and is started again: {reason}"


@contextmanager
def _server_process(request: Mapping[str, Any]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "dots1_local.devices.worker", json.dumps(request)],
        stdin=subprocess.PIPE,  # the server ends when this closes, even if this process is killed
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is for this process
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _events(line: str, cache: Path | None) -> Iterator[str]:
    """The events that a line of the server's output stands for."""
    if line.startswith("{"):
        message = json.loads(line)
        if "error" in message:
            raise UsageError(message["error"])
        yield message["event"]
    elif line.startswith(_REFUSED):
        yield "refused a connection that did not speak llama.cpp's RPC protocol"
    elif cache and (saved := _SAVED.search(line)) and not keep_weights(cache / saved[1]):
        yield f"weights are not kept, because the disk of {cache} is full"


def _reason(status: int, log: Iterable[str]) -> str:
    if status == -signal.SIGKILL:
        return "the process was killed, perhaps because memory ran out"
    lines = [line for line in log if line and not line.startswith(_ROUTINE)]
    causes = [line for line in lines if "GGML_ASSERT" in line or "what():" in line]
    return (causes or lines or ["it did not say why"])[-1]


def _main(request: str) -> None:
    """Run the server in this process until the process is killed or its standard input closes.

    Lines of JSON on stdout, among llama.cpp's own, tell the parent what happens.
    """
    asked = json.loads(request)
    endpoint, threads = asked["endpoint"], asked["threads"]
    Thread(target=_end_with_input, daemon=True).start()
    try:
        backends.check_rpc()
        chosen = _choose(asked["devices"])
    except Dots1Error as error:
        _send("error", str(error))
        return
    for each in chosen:
        free = "" if each.free == each.total else f"{human_bytes(each.free)} free of "
        memory = f"{free}{human_bytes(each.total)}"
        _send("event", f"serving {each.name} ({each.description.strip()}) with {memory}")
    host, _, port = endpoint.partition(":")
    Thread(target=answer_questions, args=(host, int(port)), daemon=True).start()
    Thread(target=_report_listening, args=(endpoint, threads), daemon=True).start()
    backends.serve_rpc(endpoint, chosen, threads=threads, cache=asked["cache"])


def _choose(names: Sequence[str]) -> list[DeviceInfo]:
    """The named devices; without names the GPUs, or the CPU if there are none."""
    here = {device.name: device for device in backends.devices()}
    if unknown := [name for name in names if name not in here]:
        raise Dots1Error(f"there is no device {unknown[0]} to serve; there are {', '.join(here)}")
    gpus = [device for device in here.values() if device.kind in ("gpu", "igpu")]
    return [here[name] for name in dict.fromkeys(names)] or gpus or [here[CPU]]


def _end_with_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def _report_listening(endpoint: str, threads: int) -> None:
    """Wait until the server accepts connections, and tell the parent."""
    host, _, port = endpoint.partition(":")
    while True:
        with suppress(OSError), socket.create_connection((host, int(port)), 1):
            break
        time.sleep(0.01)
    keep_alive([int(port)])  # accepted connections inherit the option
    _send("event", f"listening at {endpoint}, {threads} thread{'s' * (threads > 1)}")
    shown = re.sub(r"^0\.0\.0\.0", "ADDRESS", endpoint)
    _send("event", f"use it with dots1 chat FILE.gguf --worker {shown}; Ctrl-C ends it")


def _send(key: str, text: str) -> None:
    # Not through C's buffers. The server may have written only the beginning of its line.
    os.write(1, b"\n" + json.dumps({key: text}).encode() + b"\n")


if __name__ == "__main__":
    _main(sys.argv[1])
