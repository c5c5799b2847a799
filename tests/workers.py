"""Programs in child processes, and real workers that serve a CPU."""

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
    """Start `dots1` in a child process that can be interrupted; its outputs are pipes."""
    return subprocess.Popen(
        [Path(sys.executable).with_name("dots1"), *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background ignore the signal, and the child would inherit that.
        preexec_fn=lambda: signal.signal(  # noqa: PLW1509 -- nothing but a signal is set
            signal.SIGINT, signal.default_int_handler
        ),
    )


class Program:
    """Python in a child process; its output, including stderr, is read line by line."""

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
        """Return the next line that contains `text`, and skip the lines before it."""
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
        """Kill the process, as a crash would; a second call does nothing."""
        self.process.kill()
        self.process.wait()


class Worker(Program):
    """The RPC server of `dots1 worker`, without its supervisor.

    It serves the CPU with one thread, on a free port of 127.0.0.1, as soon as this returns.
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
    """A worker that is killed after the block."""
    with Worker() as worker:
        yield worker


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
