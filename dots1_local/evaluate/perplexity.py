"""Perplexity and KL divergence as llama-perplexity defines them, to the printed digit."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dots1_local.engine.engine import Engine
from dots1_local.errors import UsageError
from dots1_local.evaluate.divergence import ROW, Divergence, compare, summarise
from dots1_local.evaluate.logits_file import LogitsFile, LogitsWriter, check_logits_target, encode
from dots1_local.evaluate.scoring import (
    Block,
    ScoredUbatch,
    Tokens,
    cut,
    negative_log,
    negative_log32,
    open_engine,
    score,
    thread_pool,
)
from dots1_local.placement.placement import Placement
from dots1_local.progress import Progress, silent

__all__ = ["Perplexity", "kl_divergence", "perplexity", "read_text"]

_N_CTX = 512

Base = Callable[[Block], NDArray[np.uint16]]  # returns the base model's encoded rows for a block
Steps = Iterator[tuple[ScoredUbatch, Base]]


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


def perplexity(
    path: str | Path,
    text: str,
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
) -> Perplexity:
    """Measure the perplexity of the model at `path` on at most `n_chunks` chunks of `text`.

    `save_logits` is a file to write the log-probabilities to, for `kl_divergence` and for
    llama-perplexity; with `force` it may replace another logits file. `placement` and `workers` say
    where the model lives, as in `load`; `notify` is called with the plan and the engine's warnings.

    Raises:
        UsageError: the text has fewer than 2 * n_ctx tokens.
        GGUFError: the model cannot be loaded.
        Dots1Error: the logits file exists, cannot be written, or does not fit the disk.
    """
    if save_logits is not None:
        check_logits_target(Path(save_logits), force)
    with ExitStack() as stack:
        where = {"placement": placement, "workers": workers, "notify": notify}
        engine = stack.enter_context(open_engine(path, n_ctx, threads, **where))
        chunks = cut(engine, text, n_ctx, n_chunks)
        writer = None
        if save_logits is not None:
            file = LogitsWriter(Path(save_logits), chunks, engine.n_vocab, force=force)
            writer = stack.enter_context(file)
        pool = stack.enter_context(thread_pool(threads))
        losses = np.empty((len(chunks), n_ctx - n_ctx // 2 - 1))
        loss = negative_log if writer is None else negative_log32

        def measure(block: Block) -> None:
            place = slice(block.start, block.start + len(block.targets))
            losses[block.chunk, place] = loss(block.logits, block.targets)
            if writer is not None:
                writer.write(block.chunk, block.start, block.logits)

        for ubatch in score(engine, chunks):
            list(pool.map(measure, ubatch.blocks))
            so_far = f"PPL {_exp(losses[: ubatch.chunks].mean()):.4f}" if ubatch.chunks else ""
            progress(ubatch.tokens, chunks.size, "tokens", so_far)
    return _summary(losses, n_ctx)


def _summary(losses: NDArray[np.float64], n_ctx: int) -> Perplexity:
    count = losses.size
    mean = float(losses.sum()) / count
    variance = float((losses * losses).sum()) / count - mean * mean
    error = sqrt(variance / (count - 1)) if variance > 0 else 0.0
    value = _exp(mean)
    return Perplexity(value, error * value, count, len(losses), n_ctx)


def _exp(x: float) -> float:
    """exp(x), which is infinite beyond the range of a float, as in C; a broken model needs it."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.float64(x)))


def kl_divergence(
    path: str | Path,
    *,
    logits: str | Path | None = None,
    reference: str | Path | None = None,
    text: str | None = None,
    n_ctx: int | None = None,
    n_chunks: int | None = None,
    threads: int | None = None,
    placement: Placement | str | Path | None = None,
    workers: tuple[str, ...] = (),
    notify: Callable[[str], None] = lambda sentence: None,
    progress: Progress = silent,
) -> Divergence:
    """Measure how far the model at `path` is from a base model on at most `n_chunks` chunks.

    The base is either a `logits` file, which has its own tokens and n_ctx, or a `reference` model,
    which is evaluated side by side on `text` in chunks of `n_ctx` (512 by default) tokens. The
    reference's logits are encoded in 16 bits like a file's, so that both give the same digits.
    `placement`, `workers` and `notify` are for the model at `path`; the reference runs in RAM.

    Raises:
        UsageError: there is no base, or there are two; a text or another n_ctx is given with a
            file; or the vocabularies differ.
        GGUFError: a model cannot be loaded.
        Dots1Error: the file is not a logits file, or it is damaged.
    """
    if (logits is None) == (reference is None):
        raise UsageError("KL divergence needs one base: a logits file or a reference model")
    if logits is not None and text is not None:
        raise UsageError(f"{logits} has its own text; leave out the other text")
    if reference is not None and text is None:
        raise UsageError("a reference model needs a text to compare the models on")
    with ExitStack() as stack:
        file = None if logits is None else stack.enter_context(LogitsFile.open(logits))
        if file and n_ctx not in (None, file.layout.n_ctx):
            raise UsageError(f"{logits} has chunks of {file.layout.n_ctx} tokens, not {n_ctx}")
        n_ctx = file.layout.n_ctx if file else n_ctx or _N_CTX
        where = {"placement": placement, "workers": workers, "notify": notify}
        model = stack.enter_context(open_engine(path, n_ctx, threads, **where))
        if file:
            _check_vocabulary(file.path, file.layout.n_vocab, path, model)
            chunks, steps = _beside_file(model, file, n_chunks)
        elif reference and text is not None:
            base = stack.enter_context(open_engine(reference, n_ctx, threads))
            _check_vocabulary(reference, base.n_vocab, path, model)
            chunks, steps = _beside_model(model, base, text, n_ctx, n_chunks)
        rows = _rows(chunks, steps, stack.enter_context(thread_pool(threads)), progress)
    return summarise(rows, n_ctx)


def _check_vocabulary(base: str | Path, n_vocab: int, path: str | Path, model: Engine) -> None:
    if n_vocab != model.n_vocab:
        raise UsageError(f"{base} has a vocabulary of {n_vocab}, but {path} has {model.n_vocab}")


def _beside_file(model: Engine, file: LogitsFile, n_chunks: int | None) -> tuple[Tokens, Steps]:
    """The file's chunks, and what the model computes for them."""

    def base(block: Block) -> NDArray[np.uint16]:
        return file.rows(block.chunk, block.start, len(block.targets))

    chunks = file.tokens[:n_chunks]
    return chunks, ((ubatch, base) for ubatch in score(model, chunks))


def _beside_model(
    model: Engine, base: Engine, text: str, n_ctx: int, n_chunks: int | None
) -> tuple[Tokens, Steps]:
    """The text's chunks, and what both models compute for them, ubatch by ubatch."""
    chunks = cut(model, text, n_ctx, n_chunks)
    if not np.array_equal(chunks, cut(base, text, n_ctx, n_chunks)):
        raise UsageError("the two models divide the text into different tokens")
    both = zip(score(model, chunks), score(base, chunks), strict=True)
    return chunks, ((ubatch, _from_logits(reference)) for ubatch, reference in both)


def _from_logits(reference: ScoredUbatch) -> Base:
    logits = {(block.chunk, block.start): block.logits for block in reference.blocks}
    return lambda block: encode(logits[block.chunk, block.start])


def _rows(
    chunks: Tokens, steps: Steps, pool: ThreadPoolExecutor, progress: Progress
) -> NDArray[np.void]:
    """Compute figures (chunks, scored tokens) of type `ROW`."""
    n_ctx = chunks.shape[1]
    rows = np.empty((len(chunks), n_ctx - n_ctx // 2 - 1), ROW)
    for ubatch, base in steps:

        def measure(block: Block, base: Base = base) -> None:
            place = slice(block.start, block.start + len(block.targets))
            rows[block.chunk, place] = compare(base(block), block.logits, block.targets)

        list(pool.map(measure, ubatch.blocks))
        progress(ubatch.tokens, chunks.size, "tokens", _so_far(rows[: ubatch.chunks]))
    return rows


def _so_far(rows: NDArray[np.void]) -> str:
    if not rows.size:
        return ""
    return f"PPL {_exp(rows['nll'].mean()):.4f}, KLD {rows['kld'].mean():.5f}"
