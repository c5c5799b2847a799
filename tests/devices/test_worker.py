import errno
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from dots1_local.devices import backends
from dots1_local.devices.rpc import keep_alive, probe
from dots1_local.devices.worker import keep_weights, open_cache
from dots1_local.errors import Dots1Error, UsageError
from tests import helpers
from tests.workers import Program, free_port, local_worker

# llama.cpp's own client with the whole model on the worker: it computes until it is ended.
CLIENT = """
import sys
from dots1_local.devices.backends import add_worker
add_worker(sys.argv[1])
from llama_cpp import llama_cpp as llama
params = llama.llama_model_default_params()
params.n_gpu_layers = 99
model = llama.llama_model_load_from_file(sys.argv[2].encode(), params)
params = llama.llama_context_default_params()
params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
context = llama.llama_init_from_model(model, params)
while True:
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    batch = llama.llama_batch_get_one((llama.llama_token * 3)(65, 66, 67), 3)
    assert llama.llama_decode(context, batch) == 0
    print("logits", llama.llama_get_logits_ith(context, -1)[:5], flush=True)
"""
SERVE = """
import json, sys
from pathlib import Path
from dots1_local.errors import Dots1Error
from dots1_local.devices.worker import serve
options = json.loads(sys.argv[1])
cache = options.pop("cache", None)
try:
    for event in serve(threads=1, cache=cache and Path(cache), **options):
        print(event, flush=True)
except Dots1Error as error:
    print(type(error).__name__, error)
"""
HELLO = struct.pack("<BQ24x", 14, 24)
SET_TENSOR = 6

Serve = Callable[..., Program]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Runs the library's `serve` with these options in a child process that prints its events."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(Program("-c", SERVE, json.dumps(options)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return helpers.write_random_gguf(tmp_path / "model.gguf")


def client(endpoint: str, model: Path) -> Program:
    return Program("-c", CLIENT, endpoint, str(model))


def test_a_client_killed_in_mid_answer_leaves_the_worker_to_the_next(model: Path) -> None:
    with local_worker() as worker:
        with client(worker.endpoint, model) as first:
            logits = first.wait_for("logits")
            first.kill()
        with client(worker.endpoint, model) as second:
            assert second.wait_for("logits") == logits


def test_a_worker_killed_in_mid_answer_ends_its_client(model: Path) -> None:
    with local_worker() as worker, client(worker.endpoint, model) as first:
        first.wait_for("logits")
        worker.kill()
        assert "Remote RPC server crashed" in first.wait_for("RPC server")
        assert first.wait_for_end() != 0


def test_reports_what_it_serves_and_whom_it_refuses(serve: Serve) -> None:
    port = free_port()
    program = serve(port=port)
    assert program.wait_for("").startswith("serving CPU (")
    assert program.wait_for("") == f"listening at 127.0.0.1:{port}, 1 thread"
    assert f"--worker 127.0.0.1:{port}" in program.wait_for("")
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert "refused" in program.wait_for("")


@pytest.mark.parametrize(
    "request_bytes",
    [b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 16, HELLO[:12], HELLO + b"\xff" * 99, b""],
)
def test_a_malformed_request_does_not_occupy_the_worker(request_bytes: bytes) -> None:
    with local_worker() as worker:
        with socket.create_connection(("127.0.0.1", worker.port)) as stranger:
            stranger.sendall(request_bytes)
        probe([worker.endpoint])


def test_the_server_is_started_again_after_a_request_that_ends_it(serve: Serve) -> None:
    port = free_port()
    program = serve(port=port)
    program.wait_for("listening")
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(HELLO + struct.pack("<BQ", SET_TENSOR, 1 << 63))
            assert "started again: what(): " in program.wait_for("died")  # a C++ exception's
        program.wait_for("listening")
    probe([f"127.0.0.1:{port}"])


def test_the_server_ends_with_the_supervisor(serve: Serve) -> None:
    port = free_port()
    program = serve(port=port)
    program.wait_for("listening")
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(HELLO)
        assert len(client.recv(36, socket.MSG_WAITALL)) == 36
        program.kill()
        assert client.recv(1) == b""


def test_connections_of_clients_are_kept_alive() -> None:
    with (
        local_worker() as worker,
        socket.create_connection(("127.0.0.1", worker.port)) as client,
    ):
        client.sendall(HELLO)
        assert len(client.recv(36, socket.MSG_WAITALL)) == 36
        ends = f":{worker.port:04X} 0100007F:{client.getsockname()[1]:04X} "
        table = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()
        (line,) = [line for line in table if ends in line]
        assert line.split()[5].startswith("02:")  # the kernel's timer is keep-alive's


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"host": "192.0.2.1"}, ["192.0.2.1:", "--host"]),
        ({"host": "::1"}, ["::1", "IPv4"]),
        ({"host": "nobody.invalid"}, ["nobody.invalid"]),
        ({"devices": ["CUDA7"]}, ["CUDA7", "CPU"]),
        ({"cache": "/dev/null/rpc"}, ["/dev/null/rpc"]),
    ],
)
def test_names_what_it_cannot_serve(
    serve: Serve, options: dict[str, object], named: list[str]
) -> None:
    line = serve(port=free_port(), **options).wait_for("Error")
    assert all(part in line for part in ["UsageError", *named])


def test_names_a_port_that_is_taken(serve: Serve) -> None:
    with local_worker() as worker:
        line = serve(port=worker.port).wait_for("Error")
    assert "UsageError" in line
    assert f"127.0.0.1:{worker.port}: Address already in use" in line


def test_warns_of_an_open_host(serve: Serve) -> None:
    program = serve(host="0.0.0.0", port=free_port())
    assert "no authentication" in program.wait_for("warning")
    assert "--worker ADDRESS:" in program.wait_for("--worker")


def test_kept_weights_are_not_sent_again(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = 45_056  # three matrices above the 10 MiB from which the engine keeps weights
    monkeypatch.setattr(helpers, "CONFIG", replace(helpers.CONFIG, intermediate_size=width))
    model, cache = helpers.write_random_gguf(tmp_path / "model.gguf"), tmp_path / "cache" / "rpc"
    port = free_port()
    program = serve(port=port, cache=str(cache))
    program.wait_for("listening")

    def logits() -> str:
        with client(f"127.0.0.1:{port}", model) as running:
            return running.wait_for("logits")

    first = logits()
    deadline = time.monotonic() + 60
    while {file.stat().st_mode & 0o777 for file in cache.iterdir()} != {0o400}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kept = list(cache.iterdir())
    assert [file.stat().st_size for file in kept] == [width * helpers.CONFIG.hidden_size * 4] * 3
    assert cache.stat().st_mode & 0o777 == 0o700
    assert logits() == first
    for file in kept:
        file.chmod(0o600)
        file.write_bytes(bytes(file.stat().st_size))
    assert logits() != first  # so it is the files that are read


def test_weights_are_not_kept_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    whole, short = tmp_path / ("a" * 16), tmp_path / ("b" * 16)
    whole.write_bytes(b"weights")
    assert keep_weights(whole)
    monkeypatch.setattr(os, "posix_fallocate", full)
    short.write_bytes(b"wei")
    assert not keep_weights(short)
    assert list(tmp_path.iterdir()) == [whole]
    with pytest.raises(UsageError, match="No space left") as error:
        open_cache(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_incomplete_weights_of_a_killed_worker_are_deleted(tmp_path: Path) -> None:
    whole, half, other = (tmp_path / name for name in ("a" * 16, "b" * 16, "notes.txt"))
    for file in (whole, half, other):
        file.write_bytes(b"weights")
    assert keep_weights(whole)
    open_cache(tmp_path)
    assert sorted(tmp_path.iterdir()) == [whole, other]


def test_a_build_without_rpc_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "backend_names", lambda: ("CPU",))
    with pytest.raises(Dots1Error, match="-DGGML_RPC=on"):
        backends.check_rpc()


def test_keep_alive_leaves_other_files_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours, socket.socket() as other:
        before = set(os.listdir("/dev/fd"))
        keep_alive([ours.getsockname()[1]])
        assert set(os.listdir("/dev/fd")) == before
        options = [
            each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for each in (ours, other)
        ]
        assert options == [1, 0]
