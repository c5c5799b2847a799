"""`dots1 perplexity`: how well a model predicts a text, and how far it is from another model."""

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dots1_local.cli._output import Json, Threads, human_bytes, notice, print_json, progress_bar
from dots1_local.cli._planned import Plan, Workers, chosen_placement, one_sentence

if TYPE_CHECKING:
    from dots1_local.evaluate.divergence import Divergence
    from dots1_local.evaluate.perplexity import Perplexity

__all__ = ["perplexity"]

_FEW = 100  # scored tokens; under these llama-perplexity prints no statistics


def perplexity(
    model: Annotated[Path, typer.Argument(help="A dots1 GGUF file.", metavar="FILE.gguf")],
    text: Annotated[
        Path | None, typer.Option("--file", "-f", help="The text to predict, UTF-8.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", "-c", min=8, help="Tokens in a chunk; half are scored.", show_default="512"
        ),
    ] = None,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, help="Stop after so many chunks.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="OTHER.gguf", help="Compare with this model, run side by side."),
    ] = None,
    logits: Annotated[
        Path | None,
        typer.Option(help="Compare with the model that wrote this file; it brings the text."),
    ] = None,
    save_logits: Annotated[
        Path | None,
        typer.Option(help="Write log-probabilities, as llama-perplexity --kl-divergence-base."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing logits file.")
    ] = False,
    histogram: Annotated[
        bool, typer.Option("--histogram", help="Show KL divergence by token, when comparing.")
    ] = False,
    plan: Plan = None,
    worker: Workers = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure perplexity, or KL divergence from another model, in llama-perplexity's numbers.

    Examples:

      dots1 perplexity dots-DQ4.gguf -f wiki.test.raw

      dots1 perplexity dots-BF16.gguf -f wiki.test.raw --save-logits base.kld

      dots1 perplexity dots-DQ4.gguf --logits base.kld --histogram

      dots1 perplexity dots-DQ4.gguf -f wiki.test.raw --reference dots-Q8_0.gguf
    """
    compares = reference is not None or logits is not None
    if sum(option is not None for option in (reference, logits, save_logits)) > 1:
        raise typer.BadParameter("give one of --reference, --logits and --save-logits")
    if logits is None and text is None:
        raise typer.BadParameter("name the text to predict", param_hint="--file / -f")
    if logits is not None and text is not None:
        raise typer.BadParameter("--logits brings its own text; leave out -f")
    if histogram and (json or not compares):
        raise typer.BadParameter("--histogram goes with --reference or --logits, without --json")
    where = {
        "placement": chosen_placement(plan, worker or ()),
        "workers": tuple(worker or ()),
        "threads": threads,
        "tell": notice,
    }
    with one_sentence():
        if compares:
            _compare(model, text, reference, logits, context, chunks, where, json, histogram)
        elif text is not None:
            _measure(model, text, save_logits, force, context, chunks, where, json)


def _measure(
    model: Path,
    text: Path,
    save_logits: Path | None,
    force: bool,
    context: int | None,
    chunks: int | None,
    where: Mapping[str, Any],
    json: bool,
) -> None:
    from dots1_local.evaluate import perplexity as evaluate

    content = evaluate.read_text(text)
    with progress_bar("perplexity") as report:
        result = evaluate.perplexity(
            model,
            content,
            n_ctx=context or 512,
            n_chunks=chunks,
            save_logits=save_logits,
            force=force,
            progress=report,
            **where,
        )
    if save_logits is not None:
        notice(f"wrote {save_logits} ({human_bytes(save_logits.stat().st_size)})")
    if json:
        print_json(_summary(result))
    else:
        print(f"Final estimate: {result}")


def _compare(
    model: Path,
    text: Path | None,
    reference: Path | None,
    logits: Path | None,
    context: int | None,
    chunks: int | None,
    where: Mapping[str, Any],
    json: bool,
    histogram: bool,
) -> None:
    from dots1_local.evaluate import perplexity as evaluate
    from dots1_local.evaluate.divergence import histogram as picture

    content = None if text is None else evaluate.read_text(text)
    with progress_bar("KL divergence") as report:
        result = evaluate.kl_divergence(
            model,
            logits=logits,
            reference=reference,
            text=content,
            n_ctx=context,
            n_chunks=chunks,
            progress=report,
            **where,
        )
    if result.tokens < _FEW:
        notice(
            f"only {result.tokens} tokens were scored: llama-perplexity prints nothing for fewer "
            f"than {_FEW}, and errors and percentiles mean little here"
        )
    if json:
        print_json(_summary(result))
        return
    print(result)
    if histogram:
        print(f"\n{picture(result.per_token)}")


def _summary(result: "Perplexity | Divergence") -> dict[str, Any]:
    """All figures but those of single tokens; null for what is not defined."""
    from dataclasses import asdict

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value if not isinstance(value, float) or isfinite(value) else None

    return {key: plain(value) for key, value in asdict(result).items() if key != "per_token"}
