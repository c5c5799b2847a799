"""`dots1 chat`: talk to a model, or ask it one thing."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dots1_local.cli._chat_session import Opened, existing, kept, on_engine, on_server, open_session
from dots1_local.cli._output import Json, Threads, notice, print_json
from dots1_local.cli._planned import Context, Plan, Workers
from dots1_local.errors import UsageError

if TYPE_CHECKING:
    from dots1_local.chat.conversation import Conversation
    from dots1_local.chat.dialogue import Dialogue

__all__ = ["chat"]


class _Overflow(StrEnum):
    drop = "drop"
    stop = "stop"


def chat(
    file: Annotated[
        Path | None, typer.Argument(help="A dots1 GGUF file.", metavar="FILE.gguf")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--url", help="Talk to an OpenAI-compatible server: http://HOST:8000/v1, no FILE."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The server's model, if it has several.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Ask this once. Else a pipe's text, or a dialogue."),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="Replace the system prompt; '' for none.")
    ] = None,
    load: Annotated[
        Path | None, typer.Option("--load", help="Go on with a conversation that /save wrote.")
    ] = None,
    session_file: Annotated[
        Path | None,
        typer.Option(
            "--session", help="Go on with the conversation in this file, if any, and keep it there."
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Complete text without a chat template: a base model.")
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", "--temp", help="0 takes the likeliest token always; 0.7 if unset."
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", help="Choose among so many tokens; 40 if unset, 0 is off."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Choose among this share of likelihood; 0.95 if unset."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option("--min-p", help="Drop what is this much less likely; 0.05 if unset."),
    ] = None,
    repeat_penalty: Annotated[
        float | None,
        typer.Option("--repeat-penalty", help="Divide what was just said by it; 1.0 if unset."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Make answers repeatable.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", min=1, help="Cut answers off after so many.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="End answers before this text; may be repeated."),
    ] = None,
    overflow: Annotated[
        _Overflow | None,
        typer.Option(
            "--overflow", help="When the context is full: drop the oldest turns (if unset) or stop."
        ),
    ] = None,
    context: Context = None,
    plan: Plan = None,
    worker: Workers = None,
    threads: Threads = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Print answers as they are, Markdown not rendered.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Talk to a model; answers go to stdout as they are written.

    dots1 chat dots1-Q4_K_M.gguf

    dots1 chat dots1-Q4_K_M.gguf -p "Why is the sky blue?" --temp 0

    dots1 chat dots1-Q4_K_M.gguf < question.txt

    dots1 chat --url http://127.0.0.1:8000/v1

    A server's key is read from DOTS1_API_KEY, or else OPENAI_API_KEY.
    """
    opened = _partner(
        file, url, model, context=context, threads=threads, plan=plan, workers=worker or ()
    )
    if not all(stop or ()):
        raise UsageError("--stop is empty; it would stop every answer at once")
    if load and session_file:
        raise UsageError("--session loads its own file; leave out --load")
    question = _question(prompt, as_json)
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repeat_penalty": repeat_penalty,
        "seed": seed,
    }
    others = {
        "system": system,
        "max_tokens": max_tokens,
        "stop": tuple(stop) if stop else None,
        "overflow": overflow,
    }
    source = load or existing(session_file)
    with open_session(opened, source, raw, sampling, others) as (session, conversation):
        markdown = not (plain or raw)
        if question is None:
            _converse(session, markdown, session_file, source, conversation)
            return
        with kept(session, session_file):
            if as_json:
                _answer_as_json(session, question)
            else:
                _answer(session, question, markdown)


def _partner(file: Path | None, url: str | None, model: str | None, **options: Any) -> Opened:
    """Whom to talk to: the model in the file, or that of a server.

    Raises:
        UsageError: none or both are named, or options are given that the other takes.
    """
    if url is None:
        if file is None:
            raise UsageError("name a GGUF file to talk to, or a server with --url")
        if model is not None:
            raise UsageError("--model chooses a model of a server; name the server with --url")
        return partial(on_engine, model=file, **options)
    if file is not None:
        raise UsageError(f"--url talks to a server, which has its model; leave out {file}")
    for name, value in options.items():
        if value:
            option = f"--{name.removesuffix('s') if name == 'workers' else name}"
            raise UsageError(f"{option} is for an engine here; give it to the server at --url")
    return partial(on_server, url=url, model=model)


def _question(prompt: str | None, as_json: bool) -> str | None:
    """What to ask once; None for a dialogue."""
    if prompt is None and sys.stdin.isatty():
        if as_json:
            raise UsageError("--json is for one answer: ask with -p, or through a pipe")
        return None
    text = _piped_text() if prompt is None else prompt
    if not text.strip():
        place = "what is piped in" if prompt is None else "-p"
        raise UsageError(f"there is nothing to answer: {place} is empty")
    return text


def _piped_text() -> str:
    """All of stdin, less the newline that ends a file."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"what is piped in is no UTF-8 text (at byte {error.start:,})") from None


def _converse(
    session: "Dialogue",
    markdown: bool,
    file: Path | None,
    source: Path | None,
    conversation: "Conversation | None",
) -> None:
    from dots1_local.cli.repl.autosave import left_behind
    from dots1_local.cli.repl.loop import Repl

    repl = Repl(session, markdown, file)
    if source and conversation:
        repl.take_up(source, conversation)
    if sys.stderr.isatty():
        size = "" if session.n_ctx is None else f", context of {session.n_ctx:,} tokens"
        notice(f"{session.title}{size}. /help lists commands.")
        if found := left_behind():
            more = f"{len(found)} conversations were" if len(found) > 1 else "a conversation was"
            notice(f"{more} cut off; the last goes on with /load {found[-1]}")
    repl.run()


def _answer(session: "Dialogue", question: str, markdown: bool) -> None:
    """One answer to stdout, then its figures to a terminal's stderr."""
    from dots1_local.cli.repl.answer import show, tell, tell_status

    with _ending_at_interrupt(session):
        show(lambda progress: session.ask(question, progress=progress), markdown=markdown)
        if session.stats is not None:
            tell(session.stats, session.n_ctx)
        tell_status(session)


def _answer_as_json(session: "Dialogue", question: str) -> None:
    from dots1_local.cli.repl.answer import stream

    pieces: list[str] = []
    with _ending_at_interrupt(session):
        stream(lambda progress: session.ask(question, progress=progress), pieces.append)
        stats = session.stats
        if stats is not None:
            speed = stats.prompt_speed
            print_json(
                {
                    "text": "".join(pieces),
                    "stop": stats.stop,
                    "seed": session.sampling.seed,
                    "prompt_tokens": stats.prompt_tokens,
                    "reused_tokens": stats.reused_tokens,
                    "generated_tokens": None if stats.estimate else stats.generated_tokens,
                    "dropped_turns": stats.dropped_turns,
                    "prompt_tokens_per_second": speed and round(speed, 2),
                    "generated_tokens_per_second": round(stats.generation_speed, 2),
                    "model": session.model,
                }
            )


@contextmanager
def _ending_at_interrupt(session: "Dialogue") -> Iterator[None]:
    """Exit as programs do that Ctrl-C stopped, whether before or in the answer."""
    from dots1_local.cli.repl.answer import NotAnswered

    try:
        yield
    except NotAnswered:
        raise typer.Exit(130) from None
    if session.stats is not None and session.stats.stop == "interrupted":
        raise typer.Exit(130)
