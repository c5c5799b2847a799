"""A conversation as a file: JSON that a person can read, and that need not be trusted."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from dots1_local.chat.dialogue import Dialogue, Overflow
from dots1_local.chat.message import Message
from dots1_local.chat.sampling import Sampling
from dots1_local.chat.turns import count_turns
from dots1_local.errors import UsageError
from dots1_local.files.json_file import JsonError, convert_json, read_json
from dots1_local.files.partial_file import write_whole

__all__ = ["Conversation", "Settings", "load_conversation", "save_conversation", "state_path"]

_FORMAT, _KIND = "dots1-conversation", "saved conversation"


@dataclass(frozen=True)
class Settings(Sampling):
    """Sampling, and the other options of a session that are saved."""

    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    stop: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    overflow: Overflow = "drop"


@dataclass(frozen=True)
class Conversation:
    """What a session holds, without the tokens; `model` is the name of the session's model.

    The oldest turns, `dropped` of them, are not in the context. `unanswered` is a last question
    that has no answer yet, or "".
    """

    model: str
    messages: tuple[Message, ...]
    settings: Settings
    unanswered: str = ""
    dropped: int = 0

    def apply(self, session: Dialogue) -> None:
        """Give a session these messages and settings; an unanswered question is left to ask."""
        given = asdict(self.settings)
        session.messages, session.dropped = list(self.messages), self.dropped
        session.sampling = Sampling(
            **{each.name: given.pop(each.name) for each in fields(Sampling)}
        )
        for name, value in given.items():  # max_tokens, stop, overflow
            setattr(session, name, value)


class _SavedMessage(Struct, frozen=True):
    role: Literal["system", "user", "assistant"]
    text: str


class _Document(Struct, frozen=True):
    format: Literal["dots1-conversation"]
    version: Literal[1]
    model: str
    settings: Settings
    messages: list[_SavedMessage]
    unanswered: str = ""
    dropped_turns: Annotated[int, Meta(ge=0)] = 0


def state_path(path: Path) -> Path:
    """Return where the KV cache of the conversation in `path` is kept: talk.kv for talk.json."""
    return path.with_name(f"{path.stem if path.suffix == '.json' else path.name}.kv")


def save_conversation(
    path: str | Path, session: Dialogue, messages: Sequence[Message] | None = None
) -> None:
    """Write the session's conversation to `path` as a whole; if `path` is a link, it stays one.

    `messages` are by default those of the session. They may end in a question without an answer.

    Raises:
        UsageError: the file cannot be written, or another kind of file would be overwritten.
    """
    path = Path(path)
    if os.path.lexists(path):
        try:
            _read(path)
        except UsageError as error:
            raise UsageError(f"{error}; it is not overwritten, choose another name") from None
    kept = list(session.messages if messages is None else messages)
    unanswered = kept.pop().text if kept and kept[-1].role == "user" else None
    content = {
        "format": _FORMAT,
        "version": 1,
        "model": session.model,
        "settings": {
            **asdict(session.sampling),
            "max_tokens": session.max_tokens,
            "stop": list(session.stop),
            "overflow": session.overflow,
        },
        **({"dropped_turns": session.dropped} if session.dropped else {}),
        "messages": [{"role": m.role, "text": m.text} for m in kept],
        **({} if unanswered is None else {"unanswered": unanswered}),
    }
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    try:
        write_whole(Path(os.path.realpath(path)), text.encode("utf-8", errors="replace"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot write {path}: {reason}") from None


def load_conversation(path: str | Path) -> Conversation:
    """Read a file that `save_conversation` wrote.

    Raises:
        UsageError: the file is unreadable, not a saved conversation, or a damaged one.
    """
    raw = _read(Path(path))
    try:
        document = convert_json(raw, _Document)
        messages = _messages(document.messages)
        if document.dropped_turns > count_turns(messages):
            raise JsonError("expected no more than there are turns", "dropped_turns")
    except (JsonError, UsageError) as error:
        raise UsageError(f"{path} is a damaged conversation: {error}") from None
    return Conversation(
        document.model, messages, document.settings, document.unanswered, document.dropped_turns
    )


def _read(path: Path) -> Any:
    raw = read_json(path, _KIND)
    if not isinstance(raw, dict) or raw.get("format") != _FORMAT:
        raise UsageError(f"{path} is not a {_KIND}")
    return raw


def _messages(read: Sequence[_SavedMessage]) -> tuple[Message, ...]:
    """Convert messages, and check that questions and answers alternate."""
    start = bool(read) and read[0].role == "system"
    for number, message in enumerate(read[start:]):
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            raise JsonError(
                f"expected {expected}, got {message.role}", f"messages[{start + number}]"
            )
    if (len(read) - start) % 2:
        raise JsonError("the last question has no answer", f"messages[{len(read) - 1}]")
    return tuple(Message(each.role, each.text) for each in read)
