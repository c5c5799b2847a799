import errno
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from dots1_local.devices import rpc_cache, rpc_server
from dots1_local.devices.rpc import probe
from dots1_local.errors import Dots1Error, UsageError
from tests import helpers
from tests.workers import Program, Worker, free_port, local_worker

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
    """The library's `serve` in a process of its own, with these options; prints its events."""
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


def test_tells_what_it_serves_and_who_comes_and_goes(serve: Serve) -> None:
    port = free_port()
    program = serve(port=port)
    assert program.wait_for("").startswith("serving CPU (")
    assert program.wait_for("") == f"listening at 127.0.0.1:{port}, 1 thread"
    assert f"--worker 127.0.0.1:{port}" in program.wait_for("")
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(HELLO)
        assert program.wait_for("") == "a client is here"
    assert program.wait_for("") == "the client has left"
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert "no client" in program.wait_for("")


@pytest.mark.parametrize(
    "request_bytes",
    [b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 16, HELLO[:12], HELLO + b"\xff" * 99, b""],
)
def test_who_talks_nonsense_is_shown_out(request_bytes: bytes) -> None:
    with local_worker() as worker:
        with socket.create_connection(("127.0.0.1", worker.port)) as stranger:
            stranger.sendall(request_bytes)
        assert probe(worker.endpoint).devices


def test_the_server_is_started_again_after_a_request_that_ends_it(serve: Serve) -> None:
    port = free_port()
    program = serve(port=port)
    program.wait_for("listening")
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(HELLO + struct.pack("<BQ", SET_TENSOR, 1 << 63))
            assert "started again: what(): " in program.wait_for("died")  # a C++ exception's
        program.wait_for("listening")
    assert probe(f"127.0.0.1:{port}").devices


def test_the_server_ends_with_the_supervisor(serve: Serve) -> None:
    port = free_port()
    program = serve(port=port)
    program.wait_for("listening")
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(HELLO)
        assert len(client.recv(36, socket.MSG_WAITALL)) == 36
        program.kill()
        assert client.recv(1) == b""


def test_a_client_that_says_nothing_is_shown_out_and_an_idle_one_is_not() -> None:
    with (
        Worker(patience=0.2) as worker,
        socket.create_connection(("127.0.0.1", worker.port)) as idle,
        socket.create_connection(("127.0.0.1", worker.port)) as silent,
    ):
        idle.sendall(HELLO)
        assert len(idle.recv(36, socket.MSG_WAITALL)) == 36
        idle.settimeout(1)
        with pytest.raises(TimeoutError):
            idle.recv(1)
        idle.close()
        assert silent.recv(1) == b""
        assert probe(worker.endpoint).devices


def test_a_clients_machine_that_vanishes_would_be_noticed() -> None:
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
    ("options", "message"),
    [
        ({"host": "192.0.2.1"}, "UsageError cannot listen at 192.0.2.1:.*--host"),
        ({"host": "::1"}, "UsageError .*IPv4"),
        ({"host": "nobody.invalid"}, "UsageError cannot find the host 'nobody.invalid'"),
        ({"devices": ["CUDA7"]}, "UsageError there is no device CUDA7 to serve; there are CPU"),
        ({"cache": "/dev/null/rpc"}, "UsageError cannot keep weights in /dev/null/rpc"),
    ],
)
def test_what_cannot_be_served_costs_a_sentence(
    serve: Serve, options: dict[str, object], message: str
) -> None:
    line = serve(port=free_port(), **options).wait_for("Error")
    assert all(part in line for part in message.split(".*"))


def test_a_taken_port_costs_a_sentence(serve: Serve) -> None:
    with local_worker() as worker:
        line = serve(port=worker.port).wait_for("Error")
    assert f"cannot listen at 127.0.0.1:{worker.port}: Address already in use" in line


def test_an_open_host_is_warned_of(serve: Serve) -> None:
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
            line = running.wait_for("logits")
            program.wait_for("is here")
        program.wait_for("has left")
        return line

    first = logits()
    kept = list(cache.iterdir())
    assert [file.stat().st_size for file in kept] == [width * helpers.CONFIG.hidden_size * 4] * 3
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o400}
    assert cache.stat().st_mode & 0o777 == 0o700
    assert logits() == first
    for file in kept:
        file.chmod(0o600)
        file.write_bytes(bytes(file.stat().st_size))
    assert logits() != first  # so it is the files that are read


def test_weights_for_which_there_was_no_room_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    whole, short = tmp_path / ("a" * 16), tmp_path / ("b" * 16)
    whole.write_bytes(b"weights")
    assert rpc_cache.keep(tmp_path, whole.name)
    monkeypatch.setattr(os, "posix_fallocate", full)
    short.write_bytes(b"wei")
    assert not rpc_cache.keep(tmp_path, short.name)
    assert list(tmp_path.iterdir()) == [whole]
    with pytest.raises(UsageError, match=r"cannot keep weights in .*No space left"):
        rpc_cache.open_folder(tmp_path)


def test_weights_that_a_killed_worker_left_half_written_are_not_kept(tmp_path: Path) -> None:
    whole, half, other = (tmp_path / name for name in ("a" * 16, "b" * 16, "notes.txt"))
    for file in (whole, half, other):
        file.write_bytes(b"weights")
    assert rpc_cache.keep(tmp_path, whole.name)
    rpc_cache.open_folder(tmp_path)
    assert sorted(tmp_path.iterdir()) == [whole, other]


def test_a_build_without_rpc_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_server, "backend_names", lambda: ("CPU",))
    with pytest.raises(Dots1Error, match="no RPC; build one"):
        rpc_server._choose(())
