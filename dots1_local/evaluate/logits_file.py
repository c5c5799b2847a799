"""llama-perplexity's logits file: what a model predicts for every next token, in 16 bits each.

llama-perplexity's `--kl-divergence-base` writes and reads such files. They are little-endian, and
nothing is padded:

    "_logits_", int32 n_ctx, int32 n_vocab, int32 chunks
    int32 tokens, (chunks, n_ctx)
    rows, (chunks, n_ctx - 1 - n_ctx // 2), one for each scored token:
        float32 scale, float32 floor, uint16 values (n_vocab), and a 0 if n_vocab is odd

A log-probability is scale * value + floor. Log-probabilities more than 16 below the largest of
their row have the value 0. With a vocabulary of 152,064, 100 chunks of 512 tokens take 7.8 GB, so
only the rows that are asked for or given are in memory.
"""

import os
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import Dots1Error
from dots1_local.evaluate.scoring import Floats, log_sum_exp
from dots1_local.files.partial_file import (
    check_space,
    check_target,
    disk_errors,
    open_partial,
    partial_path,
    write_all,
)

__all__ = ["LogitsFile", "LogitsWriter", "check_logits_target", "decode", "encode"]

_MAGIC = b"_logits_"
_HEADER = struct.Struct("<8s3i")
_MAX_TOKENS = 1 << 27  # 512 MB; a sparse file could claim any number
_STEPS = np.float32(65535)
_RANGE = np.float32(16)

Rows = NDArray[np.uint16]


@dataclass(frozen=True)
class LogitsLayout:
    """Where the parts of a file of `chunks` chunks of `n_ctx` tokens are; sizes are in bytes."""

    n_ctx: int
    n_vocab: int
    chunks: int

    @property
    def scored(self) -> int:
        """Rows of a chunk."""
        return self.n_ctx - 1 - self.n_ctx // 2

    @property
    def row_bytes(self) -> int:
        return 2 * _slots(self.n_vocab)

    @property
    def nbytes(self) -> int:
        return self.offset(self.chunks, 0)

    def offset(self, chunk: int, row: int) -> int:
        """The offset of a row."""
        tokens = 4 * self.chunks * self.n_ctx
        return _HEADER.size + tokens + (chunk * self.scored + row) * self.row_bytes


def encode(logits: Floats) -> Rows:
    """Encode logits or log-probabilities (n, n_vocab) as rows of a logits file (n, slots).

    The arithmetic is llama-perplexity's, in float32, so that the bytes are equal.
    """
    n_vocab = logits.shape[1]
    top, log_sum = log_sum_exp(logits)
    bottom = np.maximum(logits.min(axis=1), top - _RANGE)
    scale = (top - bottom) / _STEPS
    rows = np.zeros((len(logits), _slots(n_vocab)), "<u2")
    head = rows[:, :4].view("<f4")
    head[:, 0] = scale
    head[:, 1] = bottom - top - log_sum.astype(np.float32)
    flat = scale < np.finfo(np.float32).tiny  # all logits are equal
    inverse = np.where(flat, np.float32(0), 1 / np.where(flat, np.float32(1), scale))
    steps = np.maximum(logits, bottom[:, None])
    steps -= bottom[:, None]
    steps *= inverse[:, None]
    rows[:, 4 : 4 + n_vocab] = np.rint(steps, out=steps)
    return rows


def decode(rows: Rows, n_vocab: int) -> Floats:
    """Decode rows that `encode` made to log-probabilities (n, n_vocab)."""
    head = rows[:, :4].view("<f4")
    values = rows[:, 4 : 4 + n_vocab].astype(np.float32)
    values *= head[:, :1]
    values += head[:, 1:]
    return values


def _slots(n_vocab: int) -> int:
    return 4 + n_vocab + n_vocab % 2


class LogitsFile:
    """A logits file to read; use it in a `with` statement.

    `tokens` is (chunks, n_ctx), and every token is checked to be in the vocabulary.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self._fd = path, fd
        self.layout = self._read_layout()
        self.tokens = self._read_tokens()

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a file and check everything except the rows.

        Raises:
            Dots1Error: the file is missing, is not a logits file, or is truncated or damaged.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # do not wait for a pipe
        except OSError as error:
            raise Dots1Error(f"cannot read {path}: {error.strerror}") from None
        try:
            return cls(Path(path), fd)
        except BaseException:
            os.close(fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def rows(self, chunk: int, start: int, count: int) -> Rows:
        """Read `count` encoded rows of a chunk from row `start` on; threads may call this.

        Raises:
            Dots1Error: the file has become shorter, or a row is not log-probabilities.
        """
        size = self.layout.row_bytes
        raw = self._read(self.layout.offset(chunk, start), count * size)
        rows = np.frombuffer(raw, "<u2").reshape(count, size // 2)
        with np.errstate(invalid="ignore"):  # NaN and infinity fail a comparison
            scale, floor = rows[:, :4].view("<f4").astype(np.float64).T
            # Rounding can make a probability a little larger than 1.
            sound = (scale >= 0) & (floor > -1e4) & (floor + 65535 * scale < 0.01)
        if not sound.all():
            row = start + int(np.argmin(sound))
            raise Dots1Error(
                f"{self.path} is damaged: row {row} of chunk {chunk} does not hold "
                "log-probabilities; write the file again"
            )
        return rows

    def _read_layout(self) -> LogitsLayout:
        size = os.fstat(self._fd).st_size
        if size < _HEADER.size or self._read(0, 8) != _MAGIC:
            raise Dots1Error(
                f"{self.path} is not a logits file; make one with dots1 perplexity --save-logits "
                "or llama-perplexity --kl-divergence-base"
            )
        _, n_ctx, n_vocab, chunks = _HEADER.unpack(self._read(0, _HEADER.size))
        layout = LogitsLayout(n_ctx, n_vocab, chunks)
        if min(layout.scored, n_vocab, chunks) < 1 or n_ctx * chunks > _MAX_TOKENS:
            raise Dots1Error(
                f"{self.path} claims {chunks} chunks of {n_ctx} tokens and a vocabulary of "
                f"{n_vocab}, which no logits file has; write the file again"
            )
        if size != layout.nbytes:
            raise Dots1Error(
                f"{self.path} has {size} bytes, but {chunks} chunks take {layout.nbytes}; it is "
                "incomplete or damaged, write it again"
            )
        return layout

    def _read_tokens(self) -> NDArray[np.int32]:
        shape = self.layout.chunks, self.layout.n_ctx
        raw = self._read(_HEADER.size, 4 * shape[0] * shape[1])
        tokens: NDArray[np.int32] = np.frombuffer(raw, "<i4").reshape(shape)
        if tokens.min() < 0 or tokens.max() >= self.layout.n_vocab:
            raise Dots1Error(
                f"{self.path} is damaged: it has tokens {tokens.min()} to {tokens.max()}, but a "
                f"vocabulary of {self.layout.n_vocab}; write the file again"
            )
        return tokens

    def _read(self, offset: int, count: int) -> bytes:
        raw = b""
        try:
            while len(raw) < count:  # the kernel reads at most 2 GiB at a time
                part = os.pread(self._fd, count - len(raw), offset + len(raw))
                if not part:
                    raise Dots1Error(f"{self.path} became shorter while it was read")
                raw += part
        except OSError as error:
            raise Dots1Error(f"cannot read {self.path}: {error.strerror}") from None
        return raw


def check_logits_target(path: Path, force: bool) -> None:
    """Raise a Dots1Error if a file must stay at `path`; `force` only replaces a logits file."""
    check_target(path, force=force)
    try:
        with path.open("rb") as file:
            if file.read(8) not in (_MAGIC, b""):
                raise Dots1Error(f"{path} exists and is not a logits file; name another file")
    except FileNotFoundError:
        return
    except OSError as error:
        raise Dots1Error(f"cannot write {path}: {error.strerror}") from None


class LogitsWriter:
    """Writes a logits file, rows in any order and from any thread; use it in a `with` statement.

    `PATH.partial` has its final size from the start. It gets its name when the block ends and all
    rows are written, and is removed when the block raises an exception. If the disk is full or
    fails, a Dots1Error is raised.
    """

    def __init__(
        self, path: Path, tokens: NDArray[np.int32], n_vocab: int, *, force: bool = False
    ) -> None:
        """`tokens` is (chunks, n_ctx). Nothing is written before the `with` block begins."""
        self.path = path.resolve()  # if it is a link, the file it points to is written
        self.layout = LogitsLayout(tokens.shape[1], n_vocab, tokens.shape[0])
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
            layout, tokens = self.layout, self._tokens.astype("<i4").tobytes()
            header = _HEADER.pack(_MAGIC, layout.n_ctx, layout.n_vocab, layout.chunks)
            write_all(self._fd, memoryview(header + tokens), 0)
            self._open = opened.pop_all()
        return self

    def write(self, chunk: int, start: int, logits: Floats) -> None:
        """Write logits or log-probabilities (n, n_vocab) to a chunk from row `start` on."""
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
