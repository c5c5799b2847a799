"""KL divergence from a base model as llama-perplexity defines it, to the printed digit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dots1_local.engine.engine import Engine
from dots1_local.errors import UsageError
from dots1_local.evaluate.divergence import ROW, Divergence, compare, summarise
from dots1_local.evaluate.logits_file import LogitsFile, encode
from dots1_local.evaluate.scoring import (
    ALL,
    Block,
    ScoredUbatch,
    Tokens,
    cut,
    exp,
    open_engine,
    score,
    thread_pool,
    together,
)
from dots1_local.placement.placement import Placement
from dots1_local.progress import Progress, silent

__all__ = ["kl_divergence", "kl_divergences"]

_N_CTX = 512

Base = Callable[[Block], NDArray[np.uint16]]  # returns the base model's encoded rows for a block
Steps = Iterator[tuple[ScoredUbatch, Base]]


def kl_divergence(
    path: str | Path,
    *,
    logits: str | Path | None = None,
    reference: str | Path | None = None,
    text: str | None = None,
    **options: Any,
) -> Divergence:
    """Measure how far the model at `path` is from a base model on one text; see `kl_divergences`.

    The base is either a `logits` file, which has its own text, or a `reference` model.
    """
    name = "this one"
    files = {} if logits is None else {name: logits}
    texts = {} if text is None else {name: text}
    found = kl_divergences(path, logits=files, reference=reference, texts=texts, **options)
    return found[name]


def kl_divergences(
    path: str | Path,
    *,
    logits: Mapping[str, str | Path] | None = None,
    reference: str | Path | None = None,
    texts: Mapping[str, str] | None = None,
    n_ctx: int | None = None,
    n_chunks: int | None = None,
    threads: int | None = None,
    placement: Placement | str | Path | None = None,
    workers: tuple[str, ...] = (),
    notify: Callable[[str], None] = lambda sentence: None,
    progress: Progress = silent,
) -> dict[str, Divergence]:
    """Measure how far the model at `path` is from a base model, on each text by its name.

    If there are several texts, "all" is over the tokens of all of them. At most `n_chunks` chunks
    of each are computed. The base is either a file of `logits` for each text, which has the text's
    tokens and its n_ctx, or a `reference` model, which is evaluated side by side on `texts` in
    chunks of `n_ctx` (512 by default) tokens. The reference's logits are encoded in 16 bits like a
    file's, so that both give the same digits. `placement`, `workers` and `notify` are for the model
    at `path`; the reference runs in RAM.

    Raises:
        UsageError: there is no base, or there are two; a text or another n_ctx is given with a
            file; or the vocabularies differ.
        GGUFError: a model cannot be loaded.
        Dots1Error: a file is not a logits file, or it is damaged.
    """
    logits, texts = logits or {}, texts or {}
    _check(logits, reference, texts)
    with ExitStack() as stack:
        files = {name: stack.enter_context(LogitsFile.open(each)) for name, each in logits.items()}
        n_ctx = _common_context(list(files.values()), n_ctx)
        where = {"placement": placement, "workers": workers, "notify": notify}
        model = stack.enter_context(open_engine(path, n_ctx, threads, **where))
        steps: dict[str, Callable[[Tokens], Steps]] = {}
        chunks: dict[str, Tokens] = {}
        if reference is not None:
            base = stack.enter_context(open_engine(reference, n_ctx, threads))
            _check_vocabulary(reference, base.n_vocab, path, model)
            for name, text in texts.items():
                chunks[name] = _cut_alike(model, base, text, n_ctx, n_chunks, name)
                steps[name] = partial(_beside_model, model, base)
        for name, file in files.items():
            _check_vocabulary(file.path, file.layout.n_vocab, path, model)
            chunks[name] = file.tokens[:n_chunks]
            steps[name] = partial(_beside_file, model, file)
        pool = stack.enter_context(thread_pool(threads))
        rows = {
            name: _rows(tokens, steps[name](tokens), pool, report)
            for name, tokens, report in together(chunks, progress)
        }
    if len(rows) > 1:
        rows[ALL] = np.concatenate(list(rows.values()))
    return {name: summarise(each, n_ctx) for name, each in rows.items()}


def _check(
    logits: Mapping[str, str | Path], reference: str | Path | None, texts: Mapping[str, str]
) -> None:
    """Refuse a missing base, two of them, and texts that do not go with it."""
    if bool(logits) == (reference is not None):
        raise UsageError("KL divergence needs one base: logits files or a reference model")
    if logits and texts:
        [first, *_] = logits.values()
        raise UsageError(f"{first} has its own text; leave out the other text")
    if reference is not None and not texts:
        raise UsageError("a reference model needs a text to compare the models on")


def _common_context(files: Sequence[LogitsFile], n_ctx: int | None) -> int:
    """The tokens of a chunk, on which all files and the caller must agree."""
    for file in files:
        if n_ctx not in (None, file.layout.n_ctx):
            raise UsageError(f"{file.path} has chunks of {file.layout.n_ctx} tokens, not {n_ctx}")
        n_ctx = file.layout.n_ctx
    return n_ctx or _N_CTX


def _check_vocabulary(base: str | Path, n_vocab: int, path: str | Path, model: Engine) -> None:
    if n_vocab != model.n_vocab:
        raise UsageError(f"{base} has a vocabulary of {n_vocab}, but {path} has {model.n_vocab}")


def _beside_file(model: Engine, file: LogitsFile, chunks: Tokens) -> Steps:
    """What the model computes for a file's chunks, ubatch by ubatch."""

    def base(block: Block) -> NDArray[np.uint16]:
        return file.rows(block.chunk, block.start, len(block.targets))

    return ((ubatch, base) for ubatch in score(model, chunks))


def _beside_model(model: Engine, base: Engine, chunks: Tokens) -> Steps:
    """What both models compute for a text's chunks, ubatch by ubatch."""
    both = zip(score(model, chunks), score(base, chunks), strict=True)
    return ((ubatch, _from_logits(reference)) for ubatch, reference in both)


def _cut_alike(
    model: Engine, base: Engine, text: str, n_ctx: int, n_chunks: int | None, name: str
) -> Tokens:
    """The text's chunks, which must be the same for both models."""
    chunks = cut(model, text, n_ctx, n_chunks, name)
    if not np.array_equal(chunks, cut(base, text, n_ctx, n_chunks, name)):
        raise UsageError("the two models divide the text into different tokens")
    return chunks


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
    return f"PPL {exp(rows['nll'].mean()):.4f}, KLD {rows['kld'].mean():.5f}"
