"""Calls into the engine that wait for a worker."""

import errno
import subprocess
import sys

import pytest

# Waits for a byte as llama.cpp does; Ctrl-C comes before it.
SCRIPT = """
import ctypes, os, signal, socket, sys
from threading import Timer
from dots1_local.engine.watch import engine_call

heard = []
signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
ours, theirs = socket.socketpair()
for timer in (Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]), Timer(1, theirs.send, [b"x"])):
    timer.start()
libc = ctypes.CDLL(None, use_errno=True)
with engine_call(sys.argv[1:]):
    count = libc.recv(ours.fileno(), ctypes.create_string_buffer(1), 1, 0)
print(count, ctypes.get_errno(), len(heard))
"""


@pytest.mark.parametrize(
    ("workers", "printed"),
    [(["127.0.0.1:1"], [1, 0, 1]), ([], [-1, errno.EINTR, 1])],
    ids=["with a worker", "without"],
)
def test_ctrl_c_breaks_no_system_call_that_waits_for_a_worker(
    workers: list[str], printed: list[int]
) -> None:
    command = [sys.executable, "-c", SCRIPT, *workers]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [int(number) for number in result.stdout.split()] == printed
