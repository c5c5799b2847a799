"""The loop that all evaluation shares: chunks of tokens in, logits of the scored ones out.

The text is cut into chunks of n_ctx tokens. Each is evaluated on its own, and every token after
the first half is scored: the model then has at least n_ctx / 2 tokens to go by. Chunks are
batched as llama-perplexity batches them, because the last digits depend on it.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dots1_local.devices.limits import physical_cores
from dots1_local.engine.engine import Engine, Entry
from dots1_local.engine.planned import load
from dots1_local.errors import UsageError
from dots1_local.placement.placement import MAX_SEQUENCES

__all__ = ["Block", "Ubatch", "cut", "open_engine", "score", "thread_pool"]

_N_BATCH = 2048  # llama-perplexity's default; chunks are evaluated side by side up to this
_BLOCK = 1 << 18  # logits a thread works on at a time: what it makes of them fits its cache

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Block:
    """Logits (n, n_vocab) of n scored tokens in a row, the first being `start` of its chunk's.

    `targets` (n,) are the tokens to predict. The logits are llama.cpp's own, valid until the
    engine computes the next ubatch.
    """

    chunk: int
    start: int
    logits: NDArray[np.float32]
    targets: Tokens


@dataclass(frozen=True)
class Ubatch:
    """What one step gave: `tokens` evaluated so far, `chunks` that were complete before it."""

    tokens: int
    chunks: int
    blocks: list[Block]


def open_engine(path: str | Path, n_ctx: int, threads: int | None, **options: Any) -> Engine:
    """An engine that `score` can use; `options` are those of `load`."""
    return load(
        path,
        n_ctx=n_ctx,
        n_sequences=_at_once(n_ctx),
        threads=threads,
        all_logits=True,
        **options,
    )


def thread_pool(threads: int | None) -> ThreadPoolExecutor:
    """Threads for blocks; numpy computes outside the interpreter lock."""
    return ThreadPoolExecutor(min(threads or physical_cores(), os.cpu_count() or 1))


def cut(engine: Engine, text: str, n_ctx: int, n_chunks: int | None) -> Tokens:
    """Tokens (chunks, n_ctx) of at most `n_chunks` chunks, the rest of the text cut off.

    Raises:
        UsageError: the text has fewer than 2 * n_ctx tokens.
    """
    tokens = engine.tokenize(text, special=False, add_bos=True)
    if len(tokens) < 2 * n_ctx:
        raise UsageError(
            f"perplexity at a context of {n_ctx} needs a text of at least {2 * n_ctx} tokens; "
            f"this one has {len(tokens)}"
        )
    count = min(len(tokens) // n_ctx, n_chunks or len(tokens))
    return np.array(tokens[: count * n_ctx], np.int32).reshape(count, n_ctx)


def score(engine: Engine, chunks: Tokens) -> Iterator[Ubatch]:
    """Evaluate chunks (chunks, n_ctx), a ubatch at a time.

    Chunks are evaluated side by side, a stretch of positions of all of them in a ubatch: this is
    how llama.cpp splits the batches that llama-perplexity gives it.
    """
    n_ctx = chunks.shape[1]
    for before in range(0, len(chunks), _at_once(n_ctx)):
        group = chunks[before : before + _at_once(n_ctx)]
        engine.forget()
        step = max(1, engine.n_ubatch // len(group))
        for start in range(0, n_ctx, step):
            end = min(start + step, n_ctx)
            logits = engine.submit(_entries(group[:, start:end], start, n_ctx // 2, engine.bos))
            rows = logits.reshape(len(group), -1, engine.n_vocab)
            blocks = list(_blocks(rows, group, before, max(start, n_ctx // 2)))
            yield Ubatch(before * n_ctx + len(group) * end, before, blocks)


def _at_once(n_ctx: int) -> int:
    return min(max(1, _N_BATCH // n_ctx), MAX_SEQUENCES)


def _entries(stretch: Tokens, start: int, first: int, bos: int | None) -> list[Entry]:
    """A ubatch of the same positions of every chunk; a chunk begins with BOS if the model does."""
    if start == 0 and bos is not None:
        stretch = stretch.copy()
        stretch[:, 0] = bos
    return [
        Entry(token, position, chunk, position >= first)
        for chunk, tokens in enumerate(stretch.tolist())
        for position, token in enumerate(tokens, start)
    ]


def _blocks(
    rows: NDArray[np.float32], chunks: Tokens, before: int, position: int
) -> Iterator[Block]:
    """Cut logits (chunks, n, n_vocab) of n tokens from `position` on into blocks."""
    n_ctx = chunks.shape[1]
    size = max(1, _BLOCK // rows.shape[2])
    stop = min(position + rows.shape[1], n_ctx - 1)  # what follows the last token is not known
    for number, (logits, tokens) in enumerate(zip(rows, chunks, strict=True)):
        for start in range(position, stop, size):
            end = min(start + size, stop)
            part = logits[start - position : end - position]
            yield Block(before + number, start - n_ctx // 2, part, tokens[start + 1 : end + 1])
