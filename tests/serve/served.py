"""A real `dots1 serve`, in a process of its own."""

import re
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

from tests.workers import Program

__all__ = ["DOTS1", "Served", "connect"]

DOTS1 = ("-c", "from dots1_local.cli import main; main()")


class Served(Program):
    """A server process that listens and has loaded its model."""

    def __init__(self, model: Path, *options: str, program: tuple[str, str] = DOTS1) -> None:
        super().__init__(*program, "serve", str(model), "--port", "0", "-t", "1", *options)
        self.told = self.wait_for("listening on")
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", self.told)
        assert found
        self.url, self.port = found[0], int(found[1])

        self._connections: list[HTTPConnection] = []

    def connect(self) -> HTTPConnection:
        """Return a connection that is closed with the server."""
        self._connections.append(connect(self.port))
        return self._connections[-1]

    def get(self, path: str) -> tuple[int, bytes]:
        with closing(connect(self.port)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    def __exit__(self, *exception: object) -> None:
        for connection in self._connections:
            connection.close()
        super().__exit__(*exception)


def connect(port: int) -> HTTPConnection:
    return HTTPConnection("127.0.0.1", port, timeout=60)
