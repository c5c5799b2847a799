"""`dots1 perplexity`: measure how well a model predicts a text, and how far it is from another."""

from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dots1_local.cli import _options as shared
from dots1_local.cli._options import flag, option, verb
from dots1_local.cli._output import notice, print_json, progress_bar
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from dots1_local.evaluate.divergence import Divergence
    from dots1_local.evaluate.perplexity import Perplexity

__all__ = ["PerplexityOptions", "perplexity"]

_FEW = 100  # scored tokens; llama-perplexity prints no statistics for fewer


@dataclass(frozen=True, eq=False, repr=False)
class PerplexityOptions:
    model: shared.Model
    file: Path | None = option("Predict this text, UTF-8. Optional with --logits.", "--file", "-f")
    context: int | None = option(
        "Cut the text into chunks of this many tokens; the second half of each is scored.",
        "--context",
        "-c",
        min=8,
        default="512",
    )
    chunks: int | None = option("Stop after this many chunks.", min=1, default="all")
    reference: Path | None = option("Compare with this model, and run both.", metavar="OTHER.gguf")
    logits: Path | None = option(
        "Compare with the model that wrote this file, which holds the text."
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
    """
    compares = options.reference is not None or options.logits is not None
    _check(options, compares)
    run: dict[str, Any] = {
        "placement": shared.choose_placement(options.model, options.plan, options.worker or ()),
        "workers": tuple(options.worker or ()),
        "threads": options.threads,
        "notify": notice,
        "n_chunks": options.chunks,
    }
    with shared.report_abort():
        if compares:
            _compare(options, run)
        else:
            _measure(options, run)


def _check(options: PerplexityOptions, compares: bool) -> None:
    """Refuse options that contradict each other."""
    logits_files = (options.reference, options.logits, options.save_logits)
    if sum(path is not None for path in logits_files) > 1:
        raise typer.BadParameter("give one of --reference, --logits and --save-logits")
    if options.logits is None and options.file is None:
        raise typer.BadParameter("name the text to predict", param_hint="--file / -f")
    if options.logits is not None and options.file is not None:
        raise typer.BadParameter("--logits brings its own text; leave out -f")
    if options.histogram and (options.json or not compares):
        raise typer.BadParameter("--histogram goes with --reference or --logits, without --json")


def _measure(options: PerplexityOptions, run: dict[str, Any]) -> None:
    from dots1_local.evaluate import perplexity as evaluate

    assert options.file is not None
    saved = options.save_logits
    with progress_bar("perplexity") as report:
        result = evaluate.perplexity(
            options.model,
            evaluate.read_text(options.file),
            n_ctx=options.context or 512,
            save_logits=saved,
            force=options.force,
            progress=report,
            **run,
        )
    if saved is not None:
        notice(f"wrote {saved} ({human_bytes(saved.stat().st_size)})")
    if options.json:
        print_json(_summary(result))
    else:
        print(f"Final estimate: {result}")


def _compare(options: PerplexityOptions, run: dict[str, Any]) -> None:
    from dots1_local.evaluate import perplexity as evaluate
    from dots1_local.evaluate.divergence import histogram

    with progress_bar("KL divergence") as report:
        result = evaluate.kl_divergence(
            options.model,
            logits=options.logits,
            reference=options.reference,
            text=None if options.file is None else evaluate.read_text(options.file),
            n_ctx=options.context,
            progress=report,
            **run,
        )
    if result.tokens < _FEW:
        notice(
            f"only {result.tokens} tokens were scored: llama-perplexity prints no statistics for "
            f"fewer than {_FEW}, and errors and percentiles mean little here"
        )
    if options.json:
        print_json(_summary(result))
        return
    print(result)
    if options.histogram:
        print(f"\n{histogram(result.per_token)}")


def _summary(result: "Perplexity | Divergence") -> dict[str, Any]:
    """Return all figures but those of single tokens; a figure that is not defined is None."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return value if not isinstance(value, float) or isfinite(value) else None

    return {key: finite(value) for key, value in asdict(result).items() if key != "per_token"}
