"""A conversation as a file: JSON that a person can read, and that need not be trusted."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from dots1_local.chat.dialogue import Dialogue, Overflow
from dots1_local.chat.message import Message
from dots1_local.chat.sampling import Sampling
from dots1_local.errors import UsageError
from dots1_local.files.json_file import brief, read_object
from dots1_local.files.partial_file import write_whole

__all__ = ["Conversation", "load_conversation", "save_conversation", "state_path"]

_FORMAT, _VERSION = "dots1-conversation", 1


@dataclass(frozen=True)
class Conversation:
    """What a session holds, without the tokens; `model` is the name of the model it was held with.

    `unanswered` is a last question that has no answer yet, "" if there is none.
    """

    model: str
    messages: tuple[Message, ...]
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    overflow: Overflow
    unanswered: str = ""

    def apply(self, session: Dialogue) -> None:
        """Put a session where this one was; an unanswered question is left to ask."""
        session.messages = list(self.messages)
        session.sampling = self.sampling
        session.max_tokens = self.max_tokens
        session.stop, session.overflow = self.stop, self.overflow


def state_path(path: Path) -> Path:
    """Where the KV cache of the conversation in `path` is kept: talk.kv for talk.json."""
    return path.with_name(f"{path.stem if path.suffix == '.json' else path.name}.kv")


def save_conversation(
    path: str | Path, session: Dialogue, messages: Sequence[Message] | None = None
) -> None:
    """Write the session's conversation to `path`, whole or not at all; a link stays one.

    Other `messages` than its own may end in a question that has no answer yet.

    Raises:
        UsageError: it cannot be written there, or another kind of file would be overwritten.
    """
    path = Path(path)
    if os.path.lexists(path):
        try:
            _read(path)
        except UsageError as error:
            raise UsageError(f"{error}; it stays as it is, choose another name") from None
    said = list(session.messages if messages is None else messages)
    unanswered = said.pop().text if said and said[-1].role == "user" else None
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": session.model,
        "settings": {
            **asdict(session.sampling),
            "max_tokens": session.max_tokens,
            "stop": list(session.stop),
            "overflow": session.overflow,
        },
        "messages": [{"role": m.role, "text": m.text} for m in said],
        **({} if unanswered is None else {"unanswered": unanswered}),
    }
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    try:
        write_whole(Path(os.path.realpath(path)), text.encode("utf-8", errors="replace"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {path}: {_reason(error)}") from None


def load_conversation(path: str | Path) -> Conversation:
    """The conversation in a file that `save_conversation` wrote.

    Raises:
        UsageError: unreadable, no saved conversation, or one that makes no sense.
    """
    content = _read(Path(path))
    try:
        return _conversation(content)
    except UsageError as error:
        raise UsageError(f"{path} is a damaged conversation: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    content = read_object(path, "saved conversation")
    if content.get("format") != _FORMAT:
        raise UsageError(f"{path} is no saved conversation")
    return content


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _conversation(content: dict[str, Any]) -> Conversation:
    model, version = content.get("model"), content.get("version")
    settings = content.get("settings")
    if version != _VERSION:
        raise UsageError(f"its version is {brief(version)}, and {_VERSION} is what is read here")
    if not isinstance(model, str) or not isinstance(settings, dict):
        raise UsageError("its model or its settings are missing")
    return Conversation(
        model,
        _messages(content.get("messages")),
        _sampling(settings),
        _max_tokens(settings.get("max_tokens")),
        _stop(settings.get("stop", [])),
        _overflow(settings.get("overflow", "drop")),
        _unanswered(content.get("unanswered", "")),
    )


def _messages(entries: Any) -> tuple[Message, ...]:
    if not isinstance(entries, list):
        raise UsageError("its messages are missing")
    messages = tuple(_message(entry, number) for number, entry in enumerate(entries, 1))
    skipped = sum(message.role == "system" for message in messages[:1])
    for number, message in enumerate(messages[skipped:]):
        due = ("user", "assistant")[number % 2]
        if message.role != due:
            raise UsageError(f"message {skipped + number + 1} is {message.role}'s, not {due}'s")
    if (len(messages) - skipped) % 2:
        raise UsageError("the last question has no answer")
    return messages


def _message(entry: Any, number: int) -> Message:
    role, text = (entry.get(key) if isinstance(entry, dict) else None for key in ("role", "text"))
    if role not in ("system", "user", "assistant") or not isinstance(text, str):
        raise UsageError(f"message {number} is not the text of system, user or assistant")
    return Message(role, _encodable(text))


def _sampling(settings: dict[str, Any]) -> Sampling:
    known = {
        field.name: settings[field.name] for field in fields(Sampling) if field.name in settings
    }
    biases = _logit_bias(known.pop("logit_bias", []))
    for name, value in known.items():
        if not _number(value) and not (name == "seed" and value is None):
            raise UsageError(f"{name} is {brief(value)}, not a number")
    return Sampling(**known, logit_bias=biases)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, list) or not all(map(_pair, value)):
        raise UsageError(f"logit_bias is {brief(value)}, not a list of tokens and numbers")
    return tuple((token, bias) for token, bias in value)


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value))


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _max_tokens(value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise UsageError(f"max_tokens is {brief(value)}, not a number from 1 up")
    return value


def _stop(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(each, str) and each for each in values):
        raise UsageError(f"stop is {brief(values)}, not a list of texts")
    return tuple(values)


def _overflow(value: Any) -> Overflow:
    if value not in get_args(Overflow):
        raise UsageError(f"overflow is {brief(value)}, not one of {', '.join(get_args(Overflow))}")
    chosen: Overflow = value
    return chosen


def _unanswered(value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"unanswered is {brief(value)}, not a text")
    return _encodable(value)


def _encodable(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode("utf-8")
