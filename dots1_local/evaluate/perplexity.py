"""Perplexity as llama-perplexity defines it, so that figures compare to the printed digit.

The text is cut into chunks of n_ctx tokens. Each is evaluated on its own, and every token after
the first half is scored: the model then has at least n_ctx / 2 tokens to go by. Chunks are
batched as llama-perplexity batches them, because the last digits depend on it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, sqrt
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import UsageError
from dots1_local.progress import Progress, silent
from dots1_local.runtime.engine import Engine, Entry

__all__ = ["Perplexity", "perplexity", "read_text"]

_N_BATCH = 2048  # llama-perplexity's default; chunks are evaluated side by side up to this


@dataclass(frozen=True)
class Perplexity:
    """`value` ± `error` (one standard error) over `tokens` scored tokens of `chunks` chunks."""

    value: float
    error: float
    tokens: int
    chunks: int
    n_ctx: int

    def __str__(self) -> str:
        return f"PPL = {self.value:.4f} +/- {self.error:.5f}"


def read_text(path: Path) -> str:
    """A text file as llama-perplexity reads it: line ends as they are, less one final newline.

    Raises:
        UsageError: unreadable, or not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from None
    return text.removesuffix("\n")


def perplexity(
    path: Path,
    text: str,
    *,
    n_ctx: int = 512,
    n_chunks: int | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Perplexity:
    """The perplexity of the model at `path` on `text`, on at most `n_chunks` chunks.

    Raises:
        UsageError: the text has fewer than 2 * n_ctx tokens.
        GGUFError: the file cannot be loaded.
    """
    at_once = max(1, _N_BATCH // n_ctx)
    with Engine.open(
        path, n_ctx=n_ctx, n_sequences=at_once, threads=threads, all_logits=True
    ) as engine:
        chunks = _chunks(engine, text, n_ctx, n_chunks)
        losses = np.empty((len(chunks), n_ctx - n_ctx // 2 - 1))
        for start in range(0, len(chunks), at_once):
            group = slice(start, start + at_once)
            for done in _score(engine, chunks[group], losses[group]):
                so_far = f"PPL {exp(losses[:start].mean()):.4f}" if start else ""
                progress(start * n_ctx + done, chunks.size, "tokens", so_far)
    return _summary(losses, n_ctx)


def _chunks(engine: Engine, text: str, n_ctx: int, n_chunks: int | None) -> NDArray[np.int32]:
    """Tokens (chunks, n_ctx), the rest of the text cut off."""
    tokens = engine.tokenize(text, special=False, add_bos=True)
    if len(tokens) < 2 * n_ctx:
        raise UsageError(
            f"perplexity at a context of {n_ctx} needs a text of at least {2 * n_ctx} tokens; "
            f"this one has {len(tokens)}"
        )
    count = min(len(tokens) // n_ctx, n_chunks or len(tokens))
    return np.array(tokens[: count * n_ctx], np.int32).reshape(count, n_ctx)


def _score(engine: Engine, chunks: NDArray[np.int32], losses: NDArray[np.float64]) -> Iterator[int]:
    """Fill `losses` (chunks, scored tokens) with -log p; yields the tokens evaluated so far.

    Chunks are evaluated side by side, a stretch of positions of all of them in a ubatch: this is
    how llama.cpp splits the batches that llama-perplexity gives it.
    """
    count, n_ctx = chunks.shape
    first = n_ctx // 2
    engine.forget()
    step = max(1, engine.n_ubatch // count)
    for start in range(0, n_ctx, step):
        end = min(start + step, n_ctx)
        rows = engine.submit(_entries(chunks[:, start:end], start, first, engine.bos))
        wanted = range(max(start, first), end)
        logits = rows.reshape(count, len(wanted), engine.n_vocab)
        for place, position in enumerate(wanted):
            if position + 1 < n_ctx:
                targets = chunks[:, position + 1]
                losses[:, position - first] = _negative_log(logits[:, place], targets)
        yield count * end


def _entries(stretch: NDArray[np.int32], start: int, first: int, bos: int | None) -> list[Entry]:
    """A ubatch of the same positions of every chunk; a chunk begins with BOS if the model does."""
    if start == 0 and bos is not None:
        stretch = stretch.copy()
        stretch[:, 0] = bos
    return [
        Entry(token, position, chunk, position >= first)
        for chunk, tokens in enumerate(stretch.tolist())
        for position, token in enumerate(tokens, start)
    ]


def _negative_log(logits: NDArray[np.float32], targets: NDArray[np.int32]) -> NDArray[np.float64]:
    """-log softmax(logits)[target] by row: exponentials in float32, their sum in float64."""
    top = logits.max(axis=1)
    sums = np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(targets)), targets] - top
    result: NDArray[np.float64] = np.log(sums) - chosen
    return result


def _summary(losses: NDArray[np.float64], n_ctx: int) -> Perplexity:
    count = losses.size
    mean = float(losses.sum()) / count
    variance = float((losses * losses).sum()) / count - mean * mean
    error = sqrt(variance / (count - 1)) if variance > 0 else 0.0
    return Perplexity(exp(mean), error * exp(mean), count, len(losses), n_ctx)
