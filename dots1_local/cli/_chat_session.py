"""What `dots1 chat` talks with: an engine, a session on it, and the conversation it begins with."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dots1_local.cli._output import notice
from dots1_local.cli._planned import one_sentence, open_engine
from dots1_local.errors import UsageError

if TYPE_CHECKING:
    from dots1_local.chat.conversation import Conversation
    from dots1_local.chat.dialogue import Dialogue
    from dots1_local.chat.sampling import Sampling

__all__ = ["Opened", "existing", "kept", "on_engine", "on_server", "open_session"]

Opened = Callable[["Sampling", bool], AbstractContextManager["Dialogue"]]  # given whether raw


def existing(file: Path | None) -> Path | None:
    """What --session goes on with; where there is nothing yet, a file can be made.

    Raises:
        UsageError: a dialogue keeps its conversation there.
        Dots1Error: it cannot.
    """
    from dots1_local.cli.repl.autosave import in_use
    from dots1_local.files.partial_file import check_target

    if file and not file.exists():
        check_target(file, force=True)
        return None
    if file and in_use(file):
        raise UsageError(f"a dialogue goes on in {file}; leave it first, or name another file")
    return file


@contextmanager
def on_engine(
    sampling: "Sampling",
    raw: bool,
    *,
    model: Path,
    context: str | None,
    threads: int | None,
    plan: Path | None,
    workers: Sequence[str],
) -> Iterator["Dialogue"]:
    """A conversation with a model here, run by a plan where there is a choice.

    Raises:
        UsageError: no context or plan as it should be.
        Dots1Error: whatever keeps the model from being loaded.
    """
    from dots1_local.chat.session import Session

    with one_sentence():
        engine = open_engine(model, context, plan, workers, threads=threads)
    with engine, Session(engine, sampling=sampling, raw=raw) as session:
        yield session


@contextmanager
def on_server(
    sampling: "Sampling", raw: bool, *, url: str, model: str | None
) -> Iterator["Dialogue"]:
    """A conversation with the model of an OpenAI-compatible server.

    Raises:
        UsageError: no address as it should be, or several models to choose from.
        Dots1Error: there is no such server.
    """
    from dots1_local.chat.remote import RemoteSession
    from dots1_local.cli._plain import plain

    def tell(sentence: str) -> None:
        notice(plain(sentence))

    with RemoteSession.open(url, model, notify=tell, sampling=sampling, raw=raw) as session:
        yield session


@contextmanager
def open_session(
    opened: Opened,
    source: Path | None,
    raw: bool,
    sampling: Mapping[str, Any],
    others: Mapping[str, Any],
) -> Iterator[tuple["Dialogue", "Conversation | None"]]:
    """A session, with the conversation in `source`.

    What is None of the others stays as it is by default or in that file.

    Raises:
        UsageError: a setting makes no sense, or there is no conversation in the file.
    """
    from dots1_local.chat.conversation import load_conversation
    from dots1_local.chat.sampling import Sampling
    from dots1_local.cli.repl.autosave import resume

    given = {name: value for name, value in sampling.items() if value is not None}
    chosen = Sampling(**given)  # a bad value is told before a long load
    conversation = load_conversation(source) if source else None
    with opened(chosen, raw) as session:
        if source and conversation:
            resume(source, conversation, session, quiet=not sys.stderr.isatty())
            session.sampling = replace(session.sampling, **given)
        for name, value in others.items():
            if value is not None:
                setattr(session, name, value)
        yield session, conversation


@contextmanager
def kept(session: "Dialogue", file: Path | None) -> Iterator[None]:
    """Save what is answered within, if only in part, even where the engine ends the process."""
    from dots1_local.chat.conversation import save_conversation
    from dots1_local.cli.repl.autosave import save
    from dots1_local.engine.abort import handling

    def rescue(reason: str) -> None:
        notice("\n" * sys.stdout.isatty() + f"dots1: {reason}")  # an answer may stand there
        if file:
            save_conversation(file, session, session.so_far)

    with handling(rescue):
        try:
            yield
        finally:
            if file and session.stats is not None:
                save(file, session, quiet=not sys.stderr.isatty())
