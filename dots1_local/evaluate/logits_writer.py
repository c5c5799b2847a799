"""Writing a logits file: at its final size from the start, under its name only when complete."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import Dots1Error
from dots1_local.evaluate.logits_file import MAGIC, Layout, encode
from dots1_local.files.partial_file import check_space, check_target, write_all

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
        self.path = path.resolve()  # what a link points to is written, not the link
        self.layout = Layout(tokens.shape[1], n_vocab, tokens.shape[0])
        self._tokens, self._force = tokens, force
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._written = np.zeros((self.layout.chunks, self.layout.scored), bool)
        self._fd = -1

    def __enter__(self) -> Self:
        check_logits_target(self.path, self._force)
        check_space(self.path, self.layout.nbytes, [self._partial])
        try:
            self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            self._lock()
        except OSError as error:
            raise self._failure(error) from None
        try:
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, self.layout.nbytes)
            header = self.layout.header + self._tokens.astype("<i4").tobytes()
            write_all(self._fd, memoryview(header), 0)
        except BaseException as error:
            self._discard()
            raise self._failure(error) if isinstance(error, OSError) else error from None
        return self

    def write(self, chunk: int, start: int, logits: NDArray[np.float32]) -> None:
        """Put rows of logits or log-probabilities (n, n_vocab) of a chunk from row `start` on.

        Raises:
            Dots1Error: the disk is full or broken.
        """
        rows = encode(logits)
        try:
            write_all(self._fd, memoryview(rows.tobytes()), self.layout.offset(chunk, start))
        except OSError as error:
            raise self._failure(error) from None
        self._written[chunk, start : start + len(rows)] = True

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            if not self._written.all():
                raise Dots1Error(f"{self.path} lacks rows; it is not kept")
            os.fsync(self._fd)
            os.replace(self._partial, self.path)
        except BaseException as error:
            self._discard()
            raise self._failure(error) if isinstance(error, OSError) else error from None
        os.close(self._fd)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have renamed or removed it since it was opened here.
            alone = os.path.samestat(os.fstat(self._fd), self._partial.stat())
        except (BlockingIOError, FileNotFoundError):
            alone = False
        if not alone:
            os.close(self._fd)
            raise Dots1Error(f"another run is writing {self.path}")

    def _discard(self) -> None:
        self._partial.unlink(missing_ok=True)
        os.close(self._fd)

    def _failure(self, error: OSError) -> Dots1Error:
        if error.errno == errno.ENOSPC:
            return Dots1Error(f"the disk is full; {self.path} is not written")
        return Dots1Error(f"cannot write {self.path}: {error.strerror or error}")
