"""Writing a logits file: at its final size from the start, under its name only when complete."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import Dots1Error
from dots1_local.evaluate.logits_file import MAGIC, Layout, encode
from dots1_local.files.partial_file import (
    check_space,
    check_target,
    disk_errors,
    open_partial,
    partial_path,
    write_all,
)

__all__ = ["LogitsWriter", "check_logits_target"]


def check_logits_target(path: Path, force: bool) -> None:
    """Refuse to write where something is that must stay.

    Raises:
        Dots1Error: `check_target` refuses, or `path` is no logits file, which is replaced in no
            case.
    """
    check_target(path, force=force)
    try:
        with path.open("rb") as file:
            if file.read(8) not in (MAGIC, b""):
                raise Dots1Error(f"{path} exists and is no logits file; write to another one")
    except FileNotFoundError:
        return
    except OSError as error:
        raise Dots1Error(f"cannot write {path}: {error.strerror}") from None


class LogitsWriter:
    """Writes a logits file, rows in any order and from any thread; use it in a `with` statement.

    Rows go to `PATH.partial`, which gets its name when the block ends with all rows written, and
    is removed when it ends with an exception.
    """

    def __init__(
        self, path: Path, tokens: NDArray[np.int32], n_vocab: int, *, force: bool = False
    ) -> None:
        """`tokens` is (chunks, n_ctx). Nothing is touched before the `with` block begins."""
        self.path = path.resolve()  # if it is a link, the file it points to is written
        self.layout = Layout(tokens.shape[1], n_vocab, tokens.shape[0])
        self._tokens, self._force = tokens, force
        self._written = np.zeros((self.layout.chunks, self.layout.scored), bool)
        self._open = ExitStack()
        self._fd = -1

    def __enter__(self) -> Self:
        check_logits_target(self.path, self._force)
        check_space(self.path, self.layout.nbytes, [partial_path(self.path)])
        with disk_errors(self.path, kept=False), ExitStack() as opened:
            self._fd = opened.enter_context(open_partial(self.path)).fileno()
            os.ftruncate(self._fd, self.layout.nbytes)
            header = self.layout.header + self._tokens.astype("<i4").tobytes()
            write_all(self._fd, memoryview(header), 0)
            self._open = opened.pop_all()
        return self

    def write(self, chunk: int, start: int, logits: NDArray[np.float32]) -> None:
        """Put rows of logits or log-probabilities (n, n_vocab) of a chunk from row `start` on.

        Raises:
            Dots1Error: the disk is full or broken.
        """
        rows = encode(logits)
        with disk_errors(self.path, kept=False):
            write_all(self._fd, memoryview(rows.tobytes()), self.layout.offset(chunk, start))
        self._written[chunk, start : start + len(rows)] = True

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        if kind is not None:
            self._open.__exit__(kind, *exception)
            return
        with disk_errors(self.path, kept=False), self._open:
            if not self._written.all():
                raise Dots1Error(f"{self.path} lacks rows and is not kept")
