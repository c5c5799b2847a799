"""`dots1 chat`: talk to a model, or ask it one question."""

import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from dots1_local.cli import _options as shared
from dots1_local.cli._input import check_text, piped_text
from dots1_local.cli._open import open_engine, report_abort
from dots1_local.cli._options import argument, flag, option, verb
from dots1_local.cli._output import notice, plain, print_json
from dots1_local.errors import UsageError
from dots1_local.progress import Progress

if TYPE_CHECKING:
    from dots1_local.chat.conversation import Conversation
    from dots1_local.chat.dialogue import Dialogue
    from dots1_local.chat.message import AnswerStats
    from dots1_local.chat.sampling import Sampling

__all__ = ["ChatOptions", "chat"]

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed")


@dataclass(frozen=True, eq=False, repr=False)
class ChatOptions:
    file: Path | None = argument(
        f"{shared.MODEL_HELP} Optional with --url.", metavar=shared.MODEL, value=None
    )
    url: str | None = option("Talk to an OpenAI-compatible server, such as http://HOST:8000/v1.")
    model: str | None = option(
        "Use this model of the server.", "--model", "-m", default="its only one"
    )
    prompt: str | None = option(
        "Ask this one question, below what is piped in.",
        "--prompt",
        "-p",
        default="what is piped in, or a dialogue",
    )
    system: str | None = option("Replace the system prompt; '' removes it.")
    load: Path | None = option("Resume a conversation that /save wrote.")
    session: Path | None = option(
        "Keep the conversation in this file, and resume it if the file exists."
    )
    raw: bool = flag("Complete text without a chat template, as for a base model.", "--raw")
    temperature: float | None = option(
        "Sample at this temperature; 0 is greedy.", "--temperature", "--temp", default="0.7"
    )
    top_k: int | None = option("Choose among this many likeliest tokens; 0 is off.", default="40")
    top_p: float | None = option(
        "Choose among tokens that add up to this probability; 1 is off.", default="0.95"
    )
    min_p: float | None = option(
        "Drop tokens below this share of the top probability; 0 is off.", default="0.05"
    )
    repeat_penalty: float | None = option(
        "Weaken recent tokens by this factor; 1 is off.", default="1.0"
    )
    seed: int | None = option("Make answers repeatable.", default="a new one for every answer")
    max_tokens: int | None = option(
        "Cut an answer off after this many tokens.", "--max-tokens", "-n", min=1
    )
    stop: list[str] | None = option("End an answer before this text; repeatable.")
    overflow: Literal["drop", "stop"] | None = option(
        "When the context is full, drop the oldest turns, or stop.", default="drop"
    )
    chat_template: shared.ChatTemplate = None
    draft: shared.DraftTokens = None
    context: shared.Context = None
    plan: shared.Plan = None
    worker: shared.Workers = None
    threads: shared.Threads = None
    plain: bool = flag("Print answers as they are, without rendering Markdown.", "--plain")
    json: shared.Json = False


@verb
def chat(options: ChatOptions) -> None:
    """Talk to a model; answers go to stdout as they are written.

    dots1 chat dots1-Q4_K_M.gguf

    dots1 chat dots1-Q4_K_M.gguf -p "Why is the sky blue?" --temp 0

    dots1 chat dots1-Q4_K_M.gguf < question.txt

    dots1 chat dots1-Q4_K_M.gguf -p "Summarise this text." < text.txt

    dots1 chat ORG/NAME:Q4_K_M

    dots1 chat --url http://127.0.0.1:8000/v1

    The key for a server is read from DOTS1_API_KEY, or else from OPENAI_API_KEY.
    """
    from dots1_local.cli.repl.autosave import find_session, save_at_end

    _check(options)
    question = _question(options)
    source = options.load or find_session(options.session)
    with _open_session(options, source) as (session, conversation):
        if question is None:
            _converse(session, options, source, conversation)
            return
        with save_at_end(session, options.session):
            _answer(session, question, options)


def _check(options: ChatOptions) -> None:
    """Refuse options that contradict each other, before anything is opened."""
    here = ("chat_template", "draft", "context", "threads", "plan", "worker")
    if options.url is None:
        if options.file is None:
            raise UsageError("name a GGUF file to talk to, or a server with --url")
        if options.model is not None:
            raise UsageError("--model chooses a model of a server; name the server with --url")
    elif options.file is not None:
        raise UsageError(f"--url talks to the model of a server; leave out {options.file}")
    elif given := next((name for name in here if getattr(options, name)), None):
        given = given.replace("_", "-")
        raise UsageError(f"--{given} is for an engine here; give it to the server at --url")
    for name in ("prompt", "system", "stop"):
        given = getattr(options, name) or ""
        for text in given if isinstance(given, list) else [given]:
            check_text(f"--{name}", text)
    if not all(options.stop or ()):
        raise UsageError("--stop is empty; it would stop every answer at once")
    if options.load and options.session:
        raise UsageError("--session loads its own file; leave out --load")


def _question(options: ChatOptions) -> str | None:
    """Return what to ask once: what is piped in, and below it -p; or None for a dialogue."""
    piped, asked = piped_text(), options.prompt
    if piped is None and asked is None:
        if options.json:
            raise UsageError("--json is for one answer: ask with -p, or through a pipe")
        return None
    parts = [text for text in (piped, asked) if text and text.strip()]
    if not parts:
        source = "what is piped in" if asked is None else "-p"
        raise UsageError(f"there is nothing to answer: {source} is empty")
    return ("\n" if options.raw else "\n\n").join(parts)


@contextmanager
def _open_session(
    options: ChatOptions, source: Path | None
) -> Iterator[tuple["Dialogue", "Conversation | None"]]:
    """Yield a session, and the conversation in `source` that it resumes.

    A setting that no option gives stays as it is by default or in the conversation.
    """
    from dots1_local.chat.conversation import load_conversation
    from dots1_local.chat.sampling import Sampling
    from dots1_local.cli.repl.autosave import resume

    chosen = {name: getattr(options, name) for name in _SAMPLING}
    given = {name: value for name, value in chosen.items() if value is not None}
    sampling = Sampling(**given)  # refuses a bad value before a long load
    conversation = load_conversation(source) if source else None
    with _connect(options, sampling) as session:
        if source and conversation:
            resume(source, conversation, session, quiet=not sys.stderr.isatty())
            session.sampling = replace(session.sampling, **given)
        for name in ("system", "max_tokens", "stop", "overflow"):
            if (value := getattr(options, name)) not in (None, []):
                setattr(session, name, tuple(value) if name == "stop" else value)
        yield session, conversation


@contextmanager
def _connect(options: ChatOptions, sampling: "Sampling") -> Iterator["Dialogue"]:
    """Open a session with the model of the server or of the file."""
    if options.file is None:
        from dots1_local.chat.remote import RemoteSession

        with RemoteSession.open(
            options.url or "",
            options.model,
            notify=lambda sentence: notice(plain(sentence)),
            sampling=sampling,
            raw=options.raw,
        ) as session:
            yield session
        return
    from dots1_local.chat.draft import longest_draft
    from dots1_local.chat.session import Session

    draft = shared.parse_draft(options.draft)
    with (
        report_abort(),
        open_engine(
            options.file,
            options.context,
            options.plan,
            options.worker or (),
            raw=options.raw,
            template=options.chat_template,
            threads=options.threads,
            n_draft=longest_draft(draft),
        ) as engine,
        Session(engine, sampling=sampling, draft=draft, raw=options.raw) as local,
    ):
        yield local


def _converse(
    session: "Dialogue",
    options: ChatOptions,
    source: Path | None,
    conversation: "Conversation | None",
) -> None:
    from dots1_local.cli.repl.autosave import unfinished_sessions
    from dots1_local.cli.repl.commands import COMMANDS
    from dots1_local.cli.repl.loop import Repl

    markdown = not (options.plain or options.raw)
    repl = Repl(session, COMMANDS, markdown, options.session)
    if source and conversation:
        repl.resume(source, conversation)
    if sys.stderr.isatty():
        size = "" if session.n_ctx is None else f", context of {session.n_ctx:,} tokens"
        notice(f"{session.title}{size}. /help lists commands.")
        if found := unfinished_sessions():
            more = f"{len(found)} conversations were" if len(found) > 1 else "a conversation was"
            notice(f"{more} cut off; /load {found[-1]} resumes the last one")
    repl.run()


def _answer(session: "Dialogue", question: str, options: ChatOptions) -> None:
    """Print one answer on stdout; exit with 130 if Ctrl-C stopped it, as shells do."""
    from dots1_local.cli.repl import answer

    def ask(progress: Progress) -> Generator[str, None, None]:
        return session.ask(question, progress=progress)

    pieces: list[str] = []
    try:
        if options.json:
            answer.stream(ask, pieces.append)
        else:
            answer.print_answer(ask, markdown=not (options.plain or options.raw))
    except answer.NotAnswered:
        raise typer.Exit(130) from None
    stats = session.stats
    if stats is None:
        return
    if options.json:
        print_json(_answer_json(session, stats, "".join(pieces)))
    else:
        answer.notify(stats, session.n_ctx)
        answer.print_status(session)
    if stats.stop == "interrupted":
        raise typer.Exit(130)


def _answer_json(session: "Dialogue", stats: "AnswerStats", text: str) -> dict[str, Any]:
    speed = stats.prompt_speed
    return {
        "text": text,
        "stop": stats.stop,
        "seed": session.sampling.seed,
        "prompt_tokens": stats.prompt_tokens,
        "reused_tokens": stats.reused_tokens,
        "generated_tokens": None if stats.estimate else stats.generated_tokens,
        "dropped_turns": stats.dropped_turns,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "prompt_tokens_per_second": speed and round(speed, 2),
        "generated_tokens_per_second": round(stats.generation_speed, 2),
        "model": session.model,
    }
