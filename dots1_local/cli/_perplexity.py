"""`dots1 perplexity`: measure how well a model predicts a text, and how far it is from another."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dots1_local.cli import _options as shared
from dots1_local.cli._model import local_model
from dots1_local.cli._open import choose_placement, report_abort
from dots1_local.cli._options import exit_on_interrupt, flag, option, verb
from dots1_local.cli._output import notice, print_json, print_table, progress_bar
from dots1_local.progress import Progress
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from dots1_local.evaluate.divergence import Divergence
    from dots1_local.evaluate.perplexity import Perplexity

__all__ = ["PerplexityOptions", "perplexity"]

_FEW = 100  # scored tokens; llama-perplexity prints no statistics for fewer


@dataclass(frozen=True, eq=False, repr=False)
class PerplexityOptions:
    model: shared.Model
    file: list[str] | None = option(
        "Predict this text, UTF-8; not with --logits. Repeatable: each text is reported by its "
        "name, which is by default that of its file, and all together.",
        "--file",
        "-f",
        metavar="[NAME=]FILE",
    )
    context: int | None = option(
        "Cut a text into chunks of this many tokens; the second half of each is scored.",
        "--context",
        "-c",
        min=8,
        default="512",
    )
    chunks: int | None = option("Stop after this many chunks of a text.", min=1, default="all")
    reference: Path | None = option("Compare with this model, and run both.", metavar="OTHER.gguf")
    logits: list[str] | None = option(
        "Compare with the model that wrote this file, which holds the text; repeatable like -f.",
        metavar="[NAME=]FILE",
    )
    save_logits: Path | None = option(
        "Write log-probabilities to this file, as llama-perplexity --kl-divergence-base does."
    )
    force: bool = flag("Replace an existing file of log-probabilities.", "--force")
    histogram: bool = flag(
        "With --reference or --logits: show KL divergence by token.", "--histogram"
    )
    plan: shared.Plan = None
    worker: shared.Workers = None
    threads: shared.Threads = None
    json: shared.Json = False


@verb
def perplexity(options: PerplexityOptions) -> None:
    """Measure perplexity, or KL divergence from another model, as llama-perplexity defines them.

    Examples:

      dots1 perplexity dots-DQ4.gguf -f wiki.test.raw

      dots1 perplexity dots-BF16.gguf -f wiki.test.raw --save-logits base.kld

      dots1 perplexity dots-DQ4.gguf --logits base.kld --histogram

      dots1 perplexity dots-DQ4.gguf -f wiki.test.raw --reference dots-Q8_0.gguf

      dots1 perplexity dots-DQ4.gguf -f english=eng.txt -f chinese=zh.txt -f code.txt
    """
    compares = options.reference is not None or options.logits is not None
    _check(options, compares)
    options = replace(
        options,
        model=local_model(options.model, outlook=True),
        reference=options.reference and local_model(options.reference, outlook=True),
    )
    run: dict[str, Any] = {
        "placement": choose_placement(options.model, options.plan, options.worker or ()),
        "workers": tuple(options.worker or ()),
        "threads": options.threads,
        "notify": notice,
        "n_chunks": options.chunks,
    }
    texts = shared.named_files(options.file or (), "-f")
    logits = shared.named_files(options.logits or (), "--logits")
    with report_abort():
        if compares:
            _compare(options, texts, logits, run)
        else:
            _measure(options, texts, run)


def _check(options: PerplexityOptions, compares: bool) -> None:
    """Refuse options that contradict each other."""
    if sum(map(bool, (options.reference, options.logits, options.save_logits))) > 1:
        raise typer.BadParameter("give one of --reference, --logits and --save-logits")
    if not options.logits and not options.file:
        raise typer.BadParameter("name the text to predict", param_hint="--file / -f")
    if options.logits and options.file:
        raise typer.BadParameter("--logits brings its own text; leave out -f")
    if options.histogram and (options.json or not compares):
        raise typer.BadParameter("--histogram goes with --reference or --logits, without --json")


def _measure(options: PerplexityOptions, texts: Mapping[str, Path], run: dict[str, Any]) -> None:
    from dots1_local.evaluate.perplexity import perplexities, read_text

    saved = options.save_logits
    with progress_bar("perplexity") as bar, _so_far(bar) as report:
        results = perplexities(
            options.model,
            {name: read_text(path) for name, path in texts.items()},
            n_ctx=options.context or 512,
            save_logits=saved,
            force=options.force,
            progress=report,
            **run,
        )
    if saved is not None:
        notice(f"wrote {saved} ({human_bytes(saved.stat().st_size)})")
    if options.json:
        _print_json(results)
    elif len(results) == 1:
        print(f"Final estimate: {results[next(iter(texts))]}")
    else:
        rows = [
            (name, f"{each.chunks:,}", f"{each.tokens:,}", f"{each.value:.4f}", f"{each.error:.5f}")
            for name, each in results.items()
        ]
        print_table(("text", "chunks", "tokens", "PPL", "+/-"), rows, numbers_from=1)


@contextmanager
def _so_far(progress: Progress) -> Iterator[Progress]:
    """Say what was measured until then if Ctrl-C or a lost worker ends the measurement."""
    from dots1_local.engine.abort import on_abort

    last = ""

    def report(done: int, total: int, unit: str, what: str) -> None:
        nonlocal last
        if what:
            last = f"so far {what}, after {done:,} of {total:,} {unit}"
        progress(done, total, unit, what)

    def add(reason: str) -> str:
        return f"{reason}; {last}" if last else reason

    with exit_on_interrupt(lambda: add("stopped")), on_abort(add):
        yield report


def _compare(
    options: PerplexityOptions,
    texts: Mapping[str, Path],
    logits: Mapping[str, Path],
    run: dict[str, Any],
) -> None:
    from dots1_local.evaluate.divergence import histogram
    from dots1_local.evaluate.kl_divergence import kl_divergences
    from dots1_local.evaluate.perplexity import read_text

    with progress_bar("KL divergence") as bar, _so_far(bar) as report:
        results = kl_divergences(
            options.model,
            logits=logits,
            reference=options.reference,
            texts={name: read_text(path) for name, path in texts.items()},
            n_ctx=options.context,
            progress=report,
            **run,
        )
    for name, each in results.items():
        if each.tokens < _FEW:
            notice(
                f"only {each.tokens} tokens {f'of {name} ' if len(results) > 1 else ''}were "
                "scored: llama-perplexity prints no statistics for fewer than "
                f"{_FEW}, and errors and percentiles mean little here"
            )
    if options.json:
        _print_json(results)
        return
    if len(results) == 1:
        print(*results.values())
    else:
        _print_divergences(results)
    if options.histogram:
        for name, each in results.items():
            print(f"\n{name}" if len(results) > 1 else "", histogram(each.per_token), sep="\n")


def _print_divergences(results: "Mapping[str, Divergence]") -> None:
    """Print the figures that people compare, a text a row; --json has the others."""
    header = (
        "text", "tokens", "PPL(Q)", "PPL(base)", "PPL(Q)/PPL(base)", "mean KLD", "median KLD",
        "99.9% KLD", "same top p",
    )  # fmt: skip
    rows = [
        (
            name,
            f"{each.tokens:,}",
            f"{each.perplexity.value:.4f}",
            f"{each.base_perplexity.value:.4f}",
            f"{each.ratio.value:.6f} ± {each.ratio.error:.6f}",
            f"{each.kl_divergence.value:.6f} ± {each.kl_divergence.error:.6f}",
            f"{each.kl_percentiles[50.0]:.6f}",
            f"{each.kl_percentiles[99.9]:.6f}",
            f"{100 * each.same_top.value:.3f} ± {100 * each.same_top.error:.3f} %",
        )
        for name, each in results.items()
    ]
    print_table(header, rows, numbers_from=1)


def _print_json(results: "Mapping[str, Perplexity | Divergence]") -> None:
    """Print one text's figures as they are, and several by name, with those over all texts."""
    figures = {name: _summary(each) for name, each in results.items()}
    if len(figures) == 1:
        print_json(*figures.values())
        return
    print_json({"all": figures.pop("all"), "texts": figures})


def _summary(result: "Perplexity | Divergence") -> dict[str, Any]:
    """Return all figures but those of single tokens; a figure that is not defined is None."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return value if not isinstance(value, float) or isfinite(value) else None

    return {key: finite(value) for key, value in asdict(result).items() if key != "per_token"}
