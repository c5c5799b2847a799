"""Reading large files in many threads: shared descriptors, and buffers that each thread keeps."""

import os
import threading
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import GGUFError

__all__ = ["OpenFiles", "cores"]


def cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OpenFiles:
    """Files held open until the `with` statement ends."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for fd in self._open.values():
            os.close(fd)

    def read(self, path: Path, offset: int, count: int) -> NDArray[np.uint8]:
        """Bytes of a GGUF file, valid until the thread reads again.

        Raises:
            GGUFError: it ends early or cannot be read.
        """
        buffer = self.buffer("stored", count)
        done = 0
        try:
            fd = self.descriptor(path)
            while done < count:
                got = os.preadv(fd, [buffer[done:].data], offset + done)
                if not got:
                    raise GGUFError(f"{path} ended early; it was truncated while being read")
                done += got
        except OSError as error:
            raise GGUFError(f"cannot read {path}: {error.strerror}") from None
        return buffer

    def descriptor(self, path: Path) -> int:
        """The file's descriptor, opened at first use."""
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
            return self._open[path]

    def buffer(self, name: str, size: int) -> NDArray[np.uint8]:
        """The calling thread's scratch memory of this name; contents are undefined."""
        held: NDArray[np.uint8] | None = getattr(self._local, name, None)
        if held is None or held.size < size:
            held = np.empty(size, np.uint8)
            setattr(self._local, name, held)
        return held[:size]
