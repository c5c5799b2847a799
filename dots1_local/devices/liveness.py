"""Whether workers are alive: a question and an answer over UDP, at the port that a worker serves.

llama.cpp's RPC server answers one request of one client at a time, so a worker that computes for
minutes looks like one that is stopped, asleep or cut off. A thread of `dots1 worker` answers here
instead. Workers that never answered here, such as llama.cpp's own rpc-server or any behind an SSH
tunnel, count as alive.
"""

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from threading import Thread

__all__ = ["PATIENCE", "Pulse", "answer_questions", "answering", "end_if_silent", "given_up"]

PATIENCE = 60.0  # seconds without a sign of life after which a worker is given up

_QUESTION, _ANSWER = b"dots1 worker?", b"dots1 worker!"  # each is followed by a random number
_NUMBER = 16  # bytes
_FIRST = 0.3  # seconds for a worker's first answer
_INTERVAL = 1.0  # seconds
_answering: dict[str, bool] = {}  # workers that were asked in this process


def answer_questions(address: str, port: int) -> None:
    """The worker's part: answer until the process ends, or not at all if the port is taken."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours, suppress(OSError):
        ours.bind((address, port))
        while True:
            question, client = ours.recvfrom(64)
            number = question.removeprefix(_QUESTION)
            if len(number) == _NUMBER and len(question) > _NUMBER:
                with suppress(OSError):  # the client is gone
                    ours.sendto(_ANSWER + number, client)


def answering(workers: Iterable[str]) -> list[str]:
    """Which of the workers (host:port) answer here; each is asked once in a process."""
    workers = list(workers)
    if new := [worker for worker in workers if worker not in _answering]:
        with closing(Pulse(new)) as pulse:
            _answering.update({worker: worker in pulse.silent for worker in new})
    return [worker for worker in workers if _answering[worker]]


class Pulse:
    """Asks workers (host:port) whether they are alive.

    `silent` is for how many seconds each has not answered, for those that have answered before.
    Time in which this process was stopped itself does not count, as nobody asked then.
    """

    def __init__(self, workers: Iterable[str] = ()) -> None:
        self.silent: dict[str, float] = {}
        self._workers: dict[bytes, tuple[str, tuple[str, int]]] = {}
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self.add(workers)

    def add(self, workers: Iterable[str]) -> None:
        """Begin to ask these workers too, and wait a moment for their first answers."""
        known = {worker for worker, _ in self._workers.values()}
        added = set(workers) - known
        for worker in added:
            host, _, port = worker.partition(":")
            with suppress(OSError, UnicodeError):
                address = socket.gethostbyname(host), int(port)
                self._workers[secrets.token_bytes(_NUMBER)] = worker, address
        self.silent.update({worker: 0.0 for worker in added if _answering.get(worker)})
        deadline = time.monotonic() + _FIRST
        self.ask(0)
        while added - self.silent.keys() and time.monotonic() < deadline:
            time.sleep(0.01)
            self._hear()

    def ask(self, elapsed: float) -> None:
        """Count the answers to the last question, asked `elapsed` seconds ago, and ask again."""
        for worker in self.silent:
            self.silent[worker] += min(elapsed, 2 * _INTERVAL)
        self._hear()
        for number, (_, address) in list(self._workers.items()):
            with suppress(OSError):  # there is no way to that machine now
                self._socket.sendto(_QUESTION + number, address)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def reset(self) -> None:
        """Count the seconds from now on."""
        self.silent = dict.fromkeys(self.silent, 0.0)

    def _hear(self) -> None:
        for answer in self._answers():
            if answer.startswith(_ANSWER):
                worker, _ = self._workers.get(answer.removeprefix(_ANSWER), ("", None))
                if worker:
                    self.silent[worker] = 0.0

    def _answers(self) -> Iterator[bytes]:
        while True:
            try:
                yield self._socket.recv(64)
            except ConnectionError:  # nobody listens at one of the ports
                continue
            except OSError:
                return


def given_up(worker: str) -> str:
    """A sentence on a worker that is silent for too long."""
    return (
        f"the worker at {worker} has not answered for {PATIENCE:.0f} seconds: its process is "
        "stopped, its machine sleeps, or the network is cut; look there, and start it again"
    )


def end_if_silent(answered: Sequence[str], report: Callable[[str], None]) -> None:
    """Report a worker of `answering` that is silent for too long, and end this process.

    This returns at once.
    """
    if answered:
        _answering.update(dict.fromkeys(answered, True))
        Thread(target=_end_if_silent, args=(answered, report), daemon=True).start()


def _end_if_silent(answered: Sequence[str], report: Callable[[str], None]) -> None:
    pulse = Pulse(answered)
    while True:
        time.sleep(_INTERVAL)
        pulse.ask(_INTERVAL)
        for worker, seconds in pulse.silent.items():
            if seconds > PATIENCE:
                report(given_up(worker))
                os._exit(1)
