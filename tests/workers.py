"""Programs in processes of their own, and real workers with a CPU device of their own."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Self

__all__ = ["Program", "Worker", "free_port", "local_worker", "start_dots1"]

_DEADLINE = 60  # seconds; only a failing test waits so long


def start_dots1(*arguments: str, env: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
    """The command in a process of its own, which can be interrupted; its outputs are pipes."""
    return subprocess.Popen(
        [Path(sys.executable).with_name("dots1"), *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite run in the background ignores the signal, and so would what it starts.
        preexec_fn=lambda: signal.signal(  # noqa: PLW1509 -- nothing but a signal is set
            signal.SIGINT, signal.default_int_handler
        ),
    )


class Program:
    """Python in a process of its own; its output is read as lines, stderr's among them."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()

    def wait_for(self, text: str) -> str:
        """The next line that has this in it; those before it are passed over."""
        assert self.process.stdout
        passed = []
        watchdog = Timer(_DEADLINE, self.process.kill)
        watchdog.start()
        try:
            for line in self.process.stdout:
                if text in line:
                    return line.rstrip("\n")
                passed.append(line)
        finally:
            watchdog.cancel()
        raise AssertionError(f"it ended without {text!r}, after\n{''.join(passed)}")

    def wait_for_end(self) -> int:
        """The exit code, -9 for a process that was killed."""
        return self.process.wait(timeout=_DEADLINE)

    def kill(self) -> None:
        """As a crash or a pulled plug would end it; a second time does nothing."""
        self.process.kill()
        self.process.wait()


class Worker(Program):
    """The engine's server alone, without the supervisor of `dots1 worker`.

    It has one thread, and serves its CPU on a free port of 127.0.0.1 when this returns.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.endpoint = f"127.0.0.1:{self.port}"
        request = {
            "endpoint": self.endpoint,
            "threads": 1,
            "devices": ["CPU"],
            "cache": None,
        }
        super().__init__("-m", "dots1_local.devices.worker", json.dumps(request))
        self.wait_for("listening")


@contextmanager
def local_worker() -> Iterator[Worker]:
    """A worker for a test, killed after it."""
    with Worker() as worker:
        yield worker


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
