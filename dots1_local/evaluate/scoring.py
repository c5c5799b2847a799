"""The loop that all evaluation shares: it takes chunks of tokens and yields the scored logits.

A text is divided into chunks of n_ctx tokens. Each chunk is evaluated on its own, and every token
after its first half is scored, so that at least n_ctx / 2 tokens come before it. Chunks are batched
as llama-perplexity batches them, because the last digits depend on it. So does the precision of
softmax, which is llama-perplexity's too: exponentials in float32, their sums in float64.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dots1_local.devices.limits import physical_cores
from dots1_local.engine.engine import Engine, Entry
from dots1_local.engine.planned import load
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.placement.placement import MAX_SEQUENCES
from dots1_local.progress import Progress

__all__ = [
    "ALL", "NOT_FINITE", "Block", "Doubles", "Floats", "ScoredUbatch", "Tokens", "cut", "exp",
    "exp32", "log_sum_exp", "negative_log", "negative_log32", "open_engine", "score",
    "thread_pool", "together",
]  # fmt: skip

ALL = "all"  # the name of the results over all texts
NOT_FINITE = "the model computes NaN or infinite logits; its file may be damaged"
_N_BATCH = 2048  # tokens; llama-perplexity's default, chunks are evaluated side by side up to it
_BLOCK = 1 << 18  # logits that a thread works on at a time, so that its results fit its cache

Tokens = NDArray[np.int32]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Block:
    """Logits (n, n_vocab) of n successive scored tokens of a chunk, from its token `start` on.

    `targets` (n,) are the tokens to predict. The logits are llama.cpp's own memory, which is valid
    until the engine computes the next ubatch.
    """

    chunk: int
    start: int
    logits: Floats
    targets: Tokens


@dataclass(frozen=True)
class ScoredUbatch:
    """The blocks of a ubatch, the `tokens` evaluated so far, and the `chunks` complete before."""

    tokens: int
    chunks: int
    blocks: list[Block]


def open_engine(path: str | Path, n_ctx: int, threads: int | None, **options: Any) -> Engine:
    """Load a model so that `score` can use it; `options` are those of `load`."""
    return load(
        path, n_ctx=n_ctx, n_sequences=_at_once(n_ctx), threads=threads, all_logits=True, **options
    )


def thread_pool(threads: int | None) -> ThreadPoolExecutor:
    """Threads that work on blocks; numpy computes outside the interpreter lock."""
    return ThreadPoolExecutor(min(threads or physical_cores(), os.cpu_count() or 1))


def cut(
    engine: Engine, text: str, n_ctx: int, n_chunks: int | None, name: str = "this one"
) -> Tokens:
    """Tokenize at most `n_chunks` chunks (chunks, n_ctx); the rest of the text is left out.

    Raises:
        UsageError: the text, which errors call `name`, has fewer than 2 * n_ctx tokens.
    """
    tokens = engine.tokenize(text, special=False, add_bos=True)
    if len(tokens) < 2 * n_ctx:
        raise UsageError(
            f"perplexity at a context of {n_ctx} needs a text of at least {2 * n_ctx} tokens; "
            f"{name} has {len(tokens)}"
        )
    count = min(len(tokens) // n_ctx, n_chunks or len(tokens))
    return np.array(tokens[: count * n_ctx], np.int32).reshape(count, n_ctx)


def together(
    chunks: Mapping[str, Tokens], progress: Progress
) -> Iterator[tuple[str, Tokens, Progress]]:
    """Yield each text's name and chunks, and a progress that counts the tokens of all texts."""
    tokens_of_all = sum(each.size for each in chunks.values())
    before = 0
    for name, tokens in chunks.items():

        def report(done: int, total: int, unit: str, what: str, before: int = before) -> None:
            progress(before + done, tokens_of_all, unit, what)

        yield name, tokens, report
        before += tokens.size


def score(engine: Engine, chunks: Tokens) -> Iterator[ScoredUbatch]:
    """Evaluate chunks (chunks, n_ctx), a ubatch at a time.

    A ubatch holds the same positions of several chunks, because llama.cpp splits the batches of
    llama-perplexity in this way.
    """
    n_ctx = chunks.shape[1]
    at_once = min(_at_once(n_ctx), engine.n_ubatch)
    for before in range(0, len(chunks), at_once):
        group = chunks[before : before + at_once]
        engine.forget()
        step = engine.n_ubatch // len(group)
        for start in range(0, n_ctx, step):
            end = min(start + step, n_ctx)
            logits = engine.submit(_entries(group[:, start:end], start, n_ctx // 2, engine.bos))
            rows = logits.reshape(len(group), -1, engine.n_vocab)
            blocks = list(_blocks(rows, group, before, max(start, n_ctx // 2)))
            yield ScoredUbatch(before * n_ctx + len(group) * end, before, blocks)


def _at_once(n_ctx: int) -> int:
    return min(max(1, _N_BATCH // n_ctx), MAX_SEQUENCES)


def _entries(stretch: Tokens, start: int, first: int, bos: int | None) -> list[Entry]:
    """A ubatch of the same positions of every chunk; BOS replaces a chunk's first token."""
    if start == 0 and bos is not None:
        stretch = stretch.copy()
        stretch[:, 0] = bos
    return [
        Entry(token, position, chunk, position >= first)
        for chunk, tokens in enumerate(stretch.tolist())
        for position, token in enumerate(tokens, start)
    ]


def _blocks(rows: Floats, chunks: Tokens, before: int, position: int) -> Iterator[Block]:
    """Divide logits (chunks, n, n_vocab) of n tokens from `position` on into blocks."""
    n_ctx = chunks.shape[1]
    size = max(1, _BLOCK // rows.shape[2])
    stop = min(position + rows.shape[1], n_ctx - 1)  # no token follows the last one
    for number, (logits, tokens) in enumerate(zip(rows, chunks, strict=True)):
        for start in range(position, stop, size):
            end = min(start + size, stop)
            part = logits[start - position : end - position]
            yield Block(before + number, start - n_ctx // 2, part, tokens[start + 1 : end + 1])


def exp(x: float) -> float:
    """exp(x), which is infinite beyond the range of a float, as in C; a broken model needs it."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.float64(x)))


def exp32(x: Floats) -> Floats:
    """exp(x), rounded once; numpy's float32 exp is less exact than C's expf."""
    out = np.empty_like(x)
    np.exp(x, dtype=np.float64, out=out, casting="same_kind")
    return out


def log_sum_exp(logits: Floats) -> tuple[Floats, Doubles]:
    """The maxima (n,) of rows (n, n_vocab), and log(sum(exp(logits - maximum))) (n,).

    Raises:
        Dots1Error: a row has no finite maximum, which happens if a model is damaged.
    """
    top: Floats = logits.max(axis=1)
    if not np.isfinite(top).all():
        raise Dots1Error(NOT_FINITE)
    sums = exp32(logits - top[:, None]).sum(axis=1, dtype=np.float64)
    return top, np.log(sums)


def negative_log(logits: Floats, targets: Tokens) -> Doubles:
    """-log softmax(logits)[target] (n,) of rows (n, n_vocab) and targets (n,)."""
    top, log_sum = log_sum_exp(logits)
    return log_sum - (logits[np.arange(len(targets)), targets] - top)


def negative_log32(logits: Floats, targets: Tokens) -> Floats:
    """`negative_log` in float32, which llama-perplexity uses if there is a logits file."""
    top, log_sum = log_sum_exp(logits)
    log_z = top + log_sum.astype(np.float32)
    nll: Floats = log_z - logits[np.arange(len(targets)), targets]
    return nll
