"""Softmax in llama-perplexity's precision: exponentials in float32, their sums in float64.

llama-perplexity's logits file: what a model thinks of every next token, in 16 bits each.

`--kl-divergence-base` writes and reads it. Little-endian, without padding between the parts:

    "_logits_", int32 n_ctx, int32 n_vocab, int32 chunks
    int32 tokens, (chunks, n_ctx)
    rows, (chunks, n_ctx - 1 - n_ctx // 2), one for each scored token:
        float32 scale, float32 floor, uint16 values (n_vocab), one more 0 if n_vocab is odd

A log-probability is scale * value + floor. Those more than 16 below the row's largest are cut off
to value 0. At a vocabulary of 152,064, 100 chunks of 512 are 7.8 GB: nothing here holds more than
the rows it is given or asked for.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import Dots1Error

__all__ = [
    "MAGIC",
    "Layout",
    "LogitsFile",
    "decode",
    "encode",
    "exp32",
    "log_sum_exp",
    "negative_log",
    "negative_log32",
]


Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


def exp32(x: Floats) -> Floats:
    """exp(x), rounded once: numpy's own float32 exp is off by more than C's expf."""
    out = np.empty_like(x)
    np.exp(x, dtype=np.float64, out=out, casting="same_kind")
    return out


def log_sum_exp(logits: Floats) -> tuple[Floats, Doubles]:
    """Of rows (n, n_vocab): their maxima (n,) and log(sum(exp(logits - maximum))) (n,).

    Raises:
        Dots1Error: a row has no finite maximum, as a damaged model gives it.
    """
    top: Floats = logits.max(axis=1)
    if not np.isfinite(top).all():
        raise Dots1Error("the model computes logits that are no numbers; is its file damaged?")
    sums = exp32(logits - top[:, None]).sum(axis=1, dtype=np.float64)
    return top, np.log(sums)


def negative_log(logits: Floats, targets: NDArray[np.int32]) -> Doubles:
    """-log softmax(logits)[target] of rows (n, n_vocab) and targets (n,)."""
    top, log_sum = log_sum_exp(logits)
    return log_sum - (logits[np.arange(len(targets)), targets] - top)


def negative_log32(logits: Floats, targets: NDArray[np.int32]) -> Floats:
    """The same in float32, as llama-perplexity has it when it writes or reads a logits file."""
    top, log_sum = log_sum_exp(logits)
    log_z = top + log_sum.astype(np.float32)
    nll: Floats = log_z - logits[np.arange(len(targets)), targets]
    return nll


MAGIC = b"_logits_"
_HEADER = struct.Struct("<8s3i")
_MAX_TOKENS = 1 << 27  # 512 MB of them; a sparse file could claim any number
_STEPS = np.float32(65535)
_RANGE = np.float32(16)

Rows = NDArray[np.uint16]


@dataclass(frozen=True)
class Layout:
    """Where everything is in a file of `chunks` chunks of `n_ctx` tokens; sizes in bytes."""

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

    @property
    def header(self) -> bytes:
        return _HEADER.pack(MAGIC, self.n_ctx, self.n_vocab, self.chunks)

    def offset(self, chunk: int, row: int) -> int:
        """The place of a row."""
        tokens = 4 * self.chunks * self.n_ctx
        return _HEADER.size + tokens + (chunk * self.scored + row) * self.row_bytes


def encode(logits: Floats) -> Rows:
    """Rows of logits or log-probabilities (n, n_vocab) as they stand in the file: (n, slots).

    The arithmetic is llama-perplexity's, in float32, so that the bytes are the same.
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
    """Log-probabilities (n, n_vocab) of rows as `encode` makes them."""
    head = rows[:, :4].view("<f4")
    values = rows[:, 4 : 4 + n_vocab].astype(np.float32)
    values *= head[:, :1]
    values += head[:, 1:]
    return values


def _slots(n_vocab: int) -> int:
    return 4 + n_vocab + n_vocab % 2


class LogitsFile:
    """A logits file to read; use it in a `with` statement.

    `tokens` is (chunks, n_ctx), each of them checked to be in the vocabulary.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self._fd = path, fd
        self.layout = self._read_layout()
        self.tokens = self._read_tokens()

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Check everything but the rows.

        Raises:
            Dots1Error: the file is missing, of another kind, truncated or corrupt.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
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
        """`count` encoded rows of a chunk from row `start` on; threads may call this.

        Raises:
            Dots1Error: the file got shorter, or a row holds no log-probabilities.
        """
        size = self.layout.row_bytes
        raw = self._read(self.layout.offset(chunk, start), count * size)
        rows = np.frombuffer(raw, "<u2").reshape(count, size // 2)
        with np.errstate(invalid="ignore"):  # NaN and infinity fail a comparison
            scale, floor = rows[:, :4].view("<f4").astype(np.float64).T
            # A probability may be a rounding error above 1.
            sound = (scale >= 0) & (floor > -1e4) & (floor + 65535 * scale < 0.01)
        if not sound.all():
            row = start + int(np.argmin(sound))
            raise Dots1Error(
                f"{self.path} is damaged: row {row} of chunk {chunk} holds no log-probabilities"
            )
        return rows

    def _read_layout(self) -> Layout:
        size = os.fstat(self._fd).st_size
        if size < _HEADER.size or self._read(0, 8) != MAGIC:
            raise Dots1Error(
                f"{self.path} is no logits file; make one with dots1 perplexity --save-logits or "
                "llama-perplexity --kl-divergence-base"
            )
        _, n_ctx, n_vocab, chunks = _HEADER.unpack(self._read(0, _HEADER.size))
        layout = Layout(n_ctx, n_vocab, chunks)
        if min(layout.scored, n_vocab, chunks) < 1 or n_ctx * chunks > _MAX_TOKENS:
            raise Dots1Error(
                f"{self.path} claims {chunks} chunks of {n_ctx} tokens and a vocabulary of "
                f"{n_vocab}, which no logits file has"
            )
        if size != layout.nbytes:
            raise Dots1Error(
                f"{self.path} has {size} bytes where {chunks} chunks take {layout.nbytes}; it is "
                "incomplete or damaged, write it again"
            )
        return layout

    def _read_tokens(self) -> NDArray[np.int32]:
        shape = self.layout.chunks, self.layout.n_ctx
        raw = self._read(_HEADER.size, 4 * shape[0] * shape[1])
        tokens: NDArray[np.int32] = np.frombuffer(raw, "<i4").reshape(shape)
        if tokens.min() < 0 or tokens.max() >= self.layout.n_vocab:
            raise Dots1Error(
                f"{self.path} is damaged: it has tokens {tokens.min()} to {tokens.max()} in a "
                f"vocabulary of {self.layout.n_vocab}"
            )
        return tokens

    def _read(self, offset: int, count: int) -> bytes:
        raw = b""
        try:
            while len(raw) < count:  # the kernel gives at most 2 GiB at a time
                part = os.pread(self._fd, count - len(raw), offset + len(raw))
                if not part:
                    raise Dots1Error(f"{self.path} got shorter while it was read")
                raw += part
        except OSError as error:
            raise Dots1Error(f"cannot read {self.path}: {error.strerror}") from None
        return raw
