"""Conversations put into files and taken up again, their KV cache with them."""

from pathlib import Path
from typing import TYPE_CHECKING

from dots1_local.cli._output import human_bytes, notice, progress_bar
from dots1_local.cli.repl.shown import one_line
from dots1_local.errors import Dots1Error, UsageError

if TYPE_CHECKING:
    from dots1_local.runtime.chat.conversation import Conversation
    from dots1_local.runtime.chat.dialogue import Dialogue

__all__ = ["resume", "save"]


def save(path: Path, session: "Dialogue", *, quiet: bool = False) -> None:
    """Write the conversation to `path` and its KV cache beside it, in place of another's.

    What keeps the cache from being written is a notice; `quiet` leaves out the one of success.

    Raises:
        UsageError: the conversation cannot be written there.
    """
    from dots1_local.runtime.chat.conversation import save_conversation, state_path
    from dots1_local.runtime.chat.kv_state import drop_state

    goes_on = _goes_on(path, session)
    save_conversation(path, session)
    if not goes_on:
        drop_state(state_path(path))
    try:
        with progress_bar("saving") as report:
            nbytes = session.save_state(state_path(path), report)
    except Dots1Error as error:
        notice(f"saved as {path}, but without its KV cache: {error}")
        return
    cache = f" with {human_bytes(nbytes)} of KV cache in {state_path(path)}" if nbytes else ""
    if not quiet:
        notice(f"saved as {path}{cache}")


def _goes_on(path: Path, session: "Dialogue") -> bool:
    """Whether the session goes on from what is in the file, so that its KV cache is of use."""
    from dots1_local.runtime.chat.conversation import load_conversation

    try:
        before = load_conversation(path).messages
    except UsageError:
        return False
    now = session.messages[: len(before)]
    return [(each.role, each.text) for each in before] == [(each.role, each.text) for each in now]


def resume(
    path: Path, conversation: "Conversation", session: "Dialogue", *, quiet: bool = False
) -> None:
    """Put the session where the conversation of `path` was, with as much KV cache as is usable."""
    from dots1_local.runtime.chat.conversation import state_path

    conversation.apply(session)
    with progress_bar("reading the KV cache"):
        cached = session.load_state(state_path(path))
    if not quiet:
        notice(f"{path}: {_summary(conversation, session, cached)}")


def _summary(conversation: "Conversation", session: "Dialogue", cached: int) -> str:
    """How far it is, and of another model it was held with."""
    turns = [message.text for message in conversation.messages if message.role == "user"]
    parts = [f"{len(turns)} turn{'s' * (len(turns) != 1)}"]
    if cached:
        parts.append(f"{cached:,} tokens of it cached")
    if conversation.model != session.model:
        parts.append(f"held with {one_line(conversation.model)}")
    summary = ", ".join(parts)
    if conversation.unanswered:
        return f"{summary}; not answered yet: {one_line(conversation.unanswered)}"
    return f"{summary}; the last: {one_line(turns[-1])}" if turns else summary
