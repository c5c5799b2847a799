"""Calls into the engine that wait for a worker."""

import ctypes
import os
import signal
import socket
from threading import Timer

import pytest

from dots1_local.engine.watch import engine_call


@pytest.mark.parametrize(("workers", "received"), [(["127.0.0.1:1"], 1), ([], -1)])
def test_ctrl_c_breaks_no_system_call_that_waits_for_a_worker(
    workers: list[str], received: int
) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    ours, theirs = socket.socketpair()
    timers = [Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]), Timer(0.5, theirs.send, [b"x"])]
    try:
        for timer in timers:
            timer.start()
        with engine_call(workers):
            count = ctypes.CDLL(None).recv(ours.fileno(), ctypes.create_string_buffer(1), 1, 0)
        for timer in timers:
            timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
        ours.close()
        theirs.close()
    assert heard == [signal.SIGINT]
    assert count == received
