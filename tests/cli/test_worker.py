import os
import signal
import socket
import struct
from pathlib import Path

import pytest

from dots1_local.devices.rpc import probe
from tests.workers import Program, free_port

DOTS1 = ("-c", "from dots1_local.cli import main; main()")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_worker_and_frees_the_port(number: signal.Signals) -> None:
    port = free_port()
    with Program(*DOTS1, "worker", "--port", str(port), "-t", "1") as program:
        program.wait_for("Ctrl-C ends it")
        with socket.create_connection(("127.0.0.1", port)) as client:  # also with a client
            client.sendall(struct.pack("<BQ24x", 14, 24))
            assert len(client.recv(36, socket.MSG_WAITALL)) == 36
            os.kill(program.process.pid, number)
            assert program.wait_for_end() == 128 + number
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))


def test_serves_and_says_so_on_stderr_alone(tmp_path: Path) -> None:
    port, output = free_port(), tmp_path / "stdout"
    main = "import os, sys; os.dup2(os.open(sys.argv.pop(), os.O_WRONLY | os.O_CREAT), 1)"
    command = f"{main}; {DOTS1[1]}"
    arguments = ("worker", "--port", str(port), "-t", "1", "--device", "CPU", str(output))
    with Program("-c", command, *arguments) as program:
        program.wait_for("listening")
        probe([f"127.0.0.1:{port}"])
        program.process.terminate()
        program.wait_for_end()
    assert output.read_bytes() == b""


@pytest.mark.parametrize("option", [("--host", "192.0.2.1"), ("--device", "CUDA7")])
def test_an_invalid_host_or_device_is_a_usage_error(option: tuple[str, str]) -> None:
    with Program(*DOTS1, "worker", "--port", str(free_port()), *option) as program:
        assert program.wait_for("").startswith("dots1: ")
        assert program.wait_for_end() == 2


def test_weights_are_cached_by_the_xdg_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Program(*DOTS1, "worker", "--port", str(free_port()), "--cache") as program:
        program.wait_for("listening")
    assert list(tmp_path.glob("*/*")) == [tmp_path / "dots1" / "rpc"]
