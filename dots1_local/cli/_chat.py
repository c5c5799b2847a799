"""`dots1 chat`: talk to a model, or ask it one thing."""

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dots1_local.cli._output import notice, progress_bar

if TYPE_CHECKING:
    from dots1_local.runtime.session import Session

__all__ = ["chat"]


def chat(
    model: Annotated[Path, typer.Argument(help="A dots1 GGUF file.", metavar="FILE.gguf")],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Ask this once. Else a pipe's text, or a dialogue."),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="Replace the system prompt; '' for none.")
    ] = None,
    temperature: Annotated[
        float,
        typer.Option("--temperature", "--temp", min=0, help="0 takes the likeliest token always."),
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0, max=1, help="Choose among this share of likelihood.")
    ] = 0.95,
    min_p: Annotated[
        float, typer.Option("--min-p", min=0, max=1, help="Drop what is this much less likely.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Make answers repeatable.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", min=1, help="Cut answers off after so many.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", "-c", min=0, help="Context in tokens: 4096 if unset, 0 for all."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", min=1, help="CPU threads; one a core if unset.")
    ] = None,
) -> None:
    """Talk to a model; answers go to stdout as they are written.

    dots1 chat dots1-Q4_K_M.gguf

    dots1 chat dots1-Q4_K_M.gguf -p "Why is the sky blue?" --temp 0

    dots1 chat dots1-Q4_K_M.gguf < question.txt
    """
    from dots1_local.runtime.engine import Engine
    from dots1_local.runtime.sampling import Sampling
    from dots1_local.runtime.session import SYSTEM_PROMPT, Session

    sampling = Sampling(temperature, top_p, min_p, seed)
    with progress_bar("loading") as report:
        engine = Engine.open(model, n_ctx=context, threads=threads, progress=report)
    instructions = SYSTEM_PROMPT if system is None else system
    with engine, Session(engine, instructions, sampling) as session:
        if prompt is None and sys.stdin.isatty():
            _dialogue(session, max_tokens)
        else:
            _say(session, _piped_text() if prompt is None else prompt, max_tokens)


def _piped_text() -> str:
    """All of stdin, less the newline that ends a file."""
    return sys.stdin.buffer.read().decode("utf-8", errors="replace").removesuffix("\n")


def _dialogue(session: "Session", max_tokens: int | None) -> None:
    """Turns until Ctrl-D, or Ctrl-C at the prompt; Ctrl-C cuts an answer off."""
    from dots1_local.errors import Dots1Error

    notice("Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            if line.strip():
                _say(session, line, max_tokens)
        except KeyboardInterrupt:
            print()
        except Dots1Error as error:
            notice(f"dots1: {error}")


def _say(session: "Session", text: str, max_tokens: int | None) -> None:
    """Stream one answer to stdout, then its figures to a terminal's stderr."""
    with closing(session.ask(text, max_tokens)) as answer:
        for piece in answer:
            print(piece, end="", flush=True)
    print()
    stats = session.stats
    if stats is not None and stats.stop == "context":
        notice("the context is full; the answer is cut off")
    if stats is not None and sys.stderr.isatty():
        notice(
            f"[{stats.prompt_tokens} tokens in, {stats.reused_tokens} of them cached, "
            f"{stats.prompt_speed:.1f}/s; {stats.generated_tokens} out, "
            f"{stats.generation_speed:.1f}/s; stopped by {stats.stop}]"
        )
