"""A link to a worker that can be cut without a word, as by a pulled cable: TCP, and UDP beside it.

The kernel still confirms what arrives at the proxy, so TCP itself does not notice.
"""

import select
import socket
from contextlib import suppress
from threading import Event, Thread
from typing import Self

__all__ = ["SilentProxy"]

_TICK = 0.05  # seconds


class SilentProxy:
    """Forwards 127.0.0.1 at `endpoint` to another port, until it falls silent."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._silent, self._closed = Event(), Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._datagrams.bind(self._listener.getsockname())
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        Thread(target=self._accept, daemon=True).start()
        Thread(target=self._forward_datagrams, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def fall_silent(self) -> None:
        """Forward nothing any more; all connections stay open."""
        self._silent.set()

    def close(self) -> None:
        """Close all connections."""
        self._closed.set()
        self._listener.close()
        self._datagrams.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as worker, suppress(OSError):
            other = {client: worker, worker: client}
            while not self._closed.is_set():
                if self._silent.is_set():
                    self._closed.wait()
                    return
                for ready in select.select([*other], [], [], _TICK)[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    other[ready].sendall(data)

    def _forward_datagrams(self) -> None:
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
            ours.settimeout(1)
            while True:
                data, client = self._datagrams.recvfrom(64)
                if not self._silent.is_set():
                    with suppress(TimeoutError):
                        ours.sendto(data, self._target)
                        self._datagrams.sendto(ours.recv(64), client)
