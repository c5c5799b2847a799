"""End calls into llama.cpp that do not return: a worker is silent, or Ctrl-C came twice.

llama.cpp waits for workers in C and without a limit, and Python's handlers of signals wait for the
main thread. So a thread watches all calls that are made with `engine_call`, and hears of Ctrl-C by
the file descriptor that C's handler of signals writes to. It ends the process as `abort.end` does,
and only within `on_abort`.
"""

import os
import select
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from threading import Thread, current_thread, get_ident, main_thread

from dots1_local.devices.liveness import PATIENCE, Pulse, given_up
from dots1_local.devices.rpc import keep_alive
from dots1_local.engine import abort

__all__ = ["Call", "engine_call", "start"]

_TICK = 0.5  # seconds
_TOLD = 10.0  # seconds of silence after which a worker is named
_LIMIT = 900.0  # seconds without progress, however alive the workers are
_GRACE = 1.0  # seconds that a call gets to return after Ctrl-C


@dataclass(eq=False)
class Call:
    """A call in progress: for how many seconds it makes none, and how often Ctrl-C came."""

    workers: Collection[str]
    seconds: float = 0.0
    interrupts: int = 0
    told: str = ""

    def progress(self) -> None:
        """Note that a long call, such as loading, has got on."""
        self.seconds = 0.0


_calls: dict[int, Call] = {}  # by thread
_interrupted = float("-inf")  # when Ctrl-C came last


@contextmanager
def engine_call(workers: Collection[str] = ()) -> Iterator[Call]:
    """Have what is called within watched; it may wait for these workers (host:port)."""
    thread = get_ident()
    if thread in _calls:
        yield _calls[thread]
        return
    if abort.handled():
        start()
    # Ctrl-C just before it may be why it is made: to close what then does not close.
    recent = time.monotonic() - _interrupted < 2 * _GRACE
    _calls[thread] = call = Call(workers, interrupts=int(recent))
    try:
        with _unbroken(workers):
            yield call
    finally:
        del _calls[thread]


@contextmanager
def _unbroken(workers: Collection[str]) -> Iterator[None]:
    """Let Ctrl-C break no system call: llama.cpp takes a broken one for the loss of a worker."""
    if not workers or current_thread() is not main_thread():  # others do not handle the signal
        yield
        return
    signal.siginterrupt(signal.SIGINT, False)
    try:
        yield
    finally:
        signal.siginterrupt(signal.SIGINT, True)


def start() -> None:
    """Watch, and hear of Ctrl-C even if a library's event loop took the descriptor since then."""
    descriptor = _started()
    if current_thread() is main_thread():
        signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)


@cache
def _started() -> int:
    """Start the thread, and return the descriptor that it hears of signals by."""
    reads, writes = os.pipe()
    for descriptor in (reads, writes):
        os.set_blocking(descriptor, False)
    Thread(target=_watch, args=(reads,), daemon=True).start()
    return writes


def _watch(signals: int) -> None:
    pulse, last = Pulse(), time.monotonic()
    while True:
        select.select([signals], [], [], _TICK)
        with suppress(BlockingIOError):
            for number in os.read(signals, 64):
                if number == signal.SIGINT:
                    _interrupt()
        elapsed, last = time.monotonic() - last, time.monotonic()
        calls = [] if not abort.handled() else list(_calls.values())
        _ask_workers(pulse, {worker for call in calls for worker in call.workers}, elapsed)
        for call in calls:
            call.seconds += min(elapsed, 2 * _TICK)  # this process may have been stopped
            _check_interrupts(call)
            _check_workers(call, pulse)


def _interrupt() -> None:
    global _interrupted  # noqa: PLW0603 -- signals are the whole process's
    _interrupted = time.monotonic()
    for call in list(_calls.values()):
        call.interrupts += 1


def _ask_workers(pulse: Pulse, workers: Collection[str], elapsed: float) -> None:
    if workers:
        pulse.add(workers)
        pulse.ask(elapsed)
        keep_alive({int(worker.rpartition(":")[2]) for worker in workers})
    else:
        pulse.reset()


def _check_interrupts(call: Call) -> None:
    if not call.interrupts or time.monotonic() - _interrupted < _GRACE:
        return
    if call.interrupts > 1:
        abort.end("stopped while the engine was busy", 128 + signal.SIGINT)
    _tell(call, "waiting for the engine; Ctrl-C again ends dots1 at once")


def _check_workers(call: Call, pulse: Pulse) -> None:
    for worker in call.workers:
        silent = min(pulse.silent.get(worker, 0.0), call.seconds)
        if silent > PATIENCE:
            abort.end(given_up(worker))
        if silent > _TOLD:
            _tell(
                call,
                f"the worker at {worker} has not answered for {_TOLD:.0f} seconds; it is given up "
                f"after {PATIENCE:.0f}, and Ctrl-C twice ends dots1 now",
            )
    if call.workers and call.seconds > _LIMIT:
        workers = " and ".join(call.workers)
        abort.end(f"gave up waiting for {workers} after {_LIMIT / 60:.0f} minutes; look there")


def _tell(call: Call, sentence: str) -> None:
    """Tell a sentence once."""
    if call.told != sentence:
        call.told = sentence
        abort.warn(sentence)
