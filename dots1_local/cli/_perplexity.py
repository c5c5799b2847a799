"""`dots1 perplexity`: how well a model predicts a text."""

from pathlib import Path
from typing import Annotated

import typer

from dots1_local.cli._output import Json, print_json, progress_bar

__all__ = ["perplexity"]


def perplexity(
    model: Annotated[Path, typer.Argument(help="A dots1 GGUF file.", metavar="FILE.gguf")],
    text: Annotated[Path, typer.Option("--file", "-f", help="The text to predict, UTF-8.")],
    context: Annotated[
        int, typer.Option("--context", "-c", min=8, help="Tokens in a chunk; half are scored.")
    ] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, help="Stop after so many chunks.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", min=1, help="CPU threads; one a core if unset.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, by llama-perplexity's definition to the printed digit.

    dots1 perplexity dots1-Q4_K_M.gguf -f wiki.test.raw -c 512
    """
    from dots1_local.evaluate import perplexity as measure

    content = measure.read_text(text)
    with progress_bar("perplexity") as report:
        result = measure.perplexity(
            model, content, n_ctx=context, n_chunks=chunks, threads=threads, progress=report
        )
    if as_json:
        from dataclasses import asdict

        print_json(asdict(result))
    else:
        print(f"Final estimate: {result}")
