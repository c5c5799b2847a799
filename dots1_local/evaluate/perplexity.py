"""Perplexity as llama-perplexity defines it, to the printed digit."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dots1_local.engine.engine import Engine
from dots1_local.errors import UsageError
from dots1_local.evaluate.logits_file import LogitsWriter, check_logits_target
from dots1_local.evaluate.scoring import (
    ALL,
    Block,
    Tokens,
    cut,
    exp,
    negative_log,
    negative_log32,
    open_engine,
    score,
    thread_pool,
    together,
)
from dots1_local.placement.placement import Placement
from dots1_local.progress import Progress, silent

__all__ = ["Perplexity", "perplexities", "perplexity", "read_text"]

_N_CTX = 512


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


def read_text(path: str | Path) -> str:
    """Read a text file as llama-perplexity does: line ends are kept, one final newline is not.

    Raises:
        UsageError: the file is unreadable, or not UTF-8.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from None
    return text.removesuffix("\n")


def perplexity(path: str | Path, text: str, **options: Any) -> Perplexity:
    """Measure the perplexity of the model at `path` on one text; see `perplexities`."""
    return perplexities(path, {"this one": text}, **options)["this one"]


def perplexities(
    path: str | Path,
    texts: Mapping[str, str],
    *,
    n_ctx: int = _N_CTX,
    n_chunks: int | None = None,
    save_logits: str | Path | None = None,
    force: bool = False,
    threads: int | None = None,
    placement: Placement | str | Path | None = None,
    workers: tuple[str, ...] = (),
    notify: Callable[[str], None] = lambda sentence: None,
    progress: Progress = silent,
) -> dict[str, Perplexity]:
    """Measure the perplexity of the model at `path` on at most `n_chunks` chunks of each text.

    The texts are given and returned by name. If there are several, "all" is over the tokens of all
    of them. `save_logits` is a file to write the log-probabilities of the only text to, for
    `kl_divergence` and for llama-perplexity; with `force` it may replace another logits file.
    `placement` and `workers` say where the model lives, as in `load`; `notify` is called with the
    plan and the engine's warnings.

    Raises:
        UsageError: a text has fewer than 2 * n_ctx tokens, or logits of several are to be saved.
        GGUFError: the model cannot be loaded.
        Dots1Error: the logits file exists, cannot be written, or does not fit the disk.
    """
    if save_logits is not None:
        if len(texts) != 1:
            raise UsageError("a logits file holds one text; save those of each text by itself")
        check_logits_target(Path(save_logits), force)
    with ExitStack() as stack:
        where = {"placement": placement, "workers": workers, "notify": notify}
        engine = stack.enter_context(open_engine(path, n_ctx, threads, **where))
        chunks = {name: cut(engine, text, n_ctx, n_chunks, name) for name, text in texts.items()}
        writer = None
        if save_logits is not None:
            [tokens] = chunks.values()
            file = LogitsWriter(Path(save_logits), tokens, engine.n_vocab, force=force)
            writer = stack.enter_context(file)
        pool = stack.enter_context(thread_pool(threads))
        losses = {
            name: _losses(engine, tokens, writer, pool, report)
            for name, tokens, report in together(chunks, progress)
        }
    found = {name: _summary(each, n_ctx) for name, each in losses.items()}
    if len(found) > 1:
        found[ALL] = _summary(np.concatenate(list(losses.values())), n_ctx)
    return found


def _losses(
    engine: Engine,
    chunks: Tokens,
    writer: LogitsWriter | None,
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> NDArray[np.float64]:
    """Compute -log p (chunks, scored tokens) of one text's chunks, and write logits."""
    n_ctx = chunks.shape[1]
    losses = np.empty((len(chunks), n_ctx - n_ctx // 2 - 1))
    loss = negative_log if writer is None else negative_log32

    def measure(block: Block) -> None:
        place = slice(block.start, block.start + len(block.targets))
        losses[block.chunk, place] = loss(block.logits, block.targets)
        if writer is not None:
            writer.write(block.chunk, block.start, block.logits)

    for ubatch in score(engine, chunks):
        list(pool.map(measure, ubatch.blocks))
        so_far = f"PPL {exp(losses[: ubatch.chunks].mean()):.4f}" if ubatch.chunks else ""
        progress(ubatch.tokens, chunks.size, "tokens", so_far)
    return losses


def _summary(losses: NDArray[np.float64], n_ctx: int) -> Perplexity:
    count = losses.size
    mean = float(losses.sum()) / count
    variance = float((losses * losses).sum()) / count - mean * mean
    error = sqrt(variance / (count - 1)) if variance > 0 else 0.0
    value = exp(mean)
    return Perplexity(value, error * value, count, len(losses), n_ctx)
