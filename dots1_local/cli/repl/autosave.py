"""Conversations put into files and taken up again, their KV cache with them.

The conversation on disk while it goes on: whatever ends the process, what was said is kept.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from dots1_local.cli._output import human_bytes, notice, progress_bar
from dots1_local.cli._plain import one_line
from dots1_local.errors import Dots1Error, UsageError

if TYPE_CHECKING:
    from dots1_local.chat.conversation import Conversation
    from dots1_local.chat.dialogue import Dialogue

import fcntl
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO

from dots1_local.cli.repl.line_editor import state_folder

if TYPE_CHECKING:
    from dots1_local.chat.dialogue import Dialogue
    from dots1_local.chat.message import Message

__all__ = [
    "Keeper",
    "in_use",
    "left_behind",
    "resume",
    "save",
]


def save(path: Path, session: "Dialogue", *, quiet: bool = False) -> None:
    """Write the conversation to `path` and its KV cache beside it, in place of another's.

    What keeps the cache from being written is a notice; `quiet` leaves out the one of success.

    Raises:
        UsageError: the conversation cannot be written there.
    """
    from dots1_local.chat.conversation import save_conversation, state_path
    from dots1_local.chat.kv_state import drop_state

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
    from dots1_local.chat.conversation import load_conversation

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
    from dots1_local.chat.conversation import state_path

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


_PATTERN = "recovery-*.json"


def left_behind() -> list[Path]:
    """Recovery files of dialogues that came to no good end, the latest last.

    One with a KV cache beside it is no longer that: a person saved in it.
    """
    from dots1_local.chat.conversation import state_path

    try:
        found = sorted(state_folder().glob(_PATTERN))
        return [path for path in found if not state_path(path).exists() and not in_use(path)]
    except (OSError, RuntimeError):
        return []


def in_use(path: Path) -> bool:
    """Whether a dialogue keeps its conversation in this file."""
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class Keeper:
    """Keeps a dialogue's conversation in `file`, or else in a recovery file until a good end."""

    def __init__(self, session: "Dialogue", file: Path | None = None) -> None:
        self._session, self._file = session, file
        self._recovery: Path | None = None
        self._locks: dict[Path, BinaryIO] = {}  # files that are ours, by what they really are
        self._complained = False
        if file:
            self._own(file)

    def keep(self, messages: Sequence["Message"] | None = None) -> Path | None:
        """Write the conversation, or other `messages`, if anything is said in it; where to.

        If it cannot be where it was asked for, that costs a notice, and the recovery file serves.
        """
        from dots1_local.chat.turns import last_turn

        messages = self._session.messages if messages is None else messages
        if last_turn(messages) is None:
            return None
        if self._file:
            problem = self._write(self._file, messages)
            if problem is None:
                self._own(self._file)
                return self._file
            if not self._complained:
                notice(problem)
                self._complained = True
        try:
            recovery = self._recovery_file()
        except (OSError, RuntimeError):
            return None
        if self._write(recovery, messages) is not None:
            return None
        self._own(recovery)
        return recovery

    def adopt(self, path: Path) -> None:
        """Take over a recovery file that was loaded: a good end removes it.

        One that was loaded before stays, as this is another conversation now.
        """
        for other in self._locks.keys() - {_real(each) for each in (path, *self._ours)}:
            self._locks.pop(other).close()
        if _real(path) in map(_real, left_behind()):
            self._own(path)

    def save(self, path: Path) -> None:
        """Save it where a person says, KV cache and all; no end removes that.

        Raises:
            UsageError: it cannot be saved there.
        """
        self._check_free(path)
        save(path, self._session)
        if (lock := self._locks.pop(_real(path), None)) is not None:
            lock.close()
        if self._file and _real(path) == _real(self._file):
            self._own(self._file)

    def end(self) -> None:
        """Save in the file that was asked for, KV cache and all; there is nothing to recover.

        Raises:
            UsageError: it cannot be saved there; a recovery file stays.
        """
        from dots1_local.chat.turns import last_turn

        if self._file and (self._file.exists() or last_turn(self._session.messages) is not None):
            self.save(self._file)
        for path, file in self._locks.items():
            if not self._file or path != _real(self._file):
                with suppress(OSError):
                    path.unlink()
            file.close()
        self._locks.clear()

    def _write(self, path: Path, messages: Sequence["Message"]) -> str | None:
        """What kept it from being written, if anything did."""
        from dots1_local.chat.conversation import save_conversation

        try:
            self._check_free(path)
            save_conversation(path, self._session, messages)
        except UsageError as error:
            return str(error)
        return None

    @property
    def _ours(self) -> list[Path]:
        """Where this conversation is kept."""
        return [path for path in (self._file, self._recovery) if path]

    def _check_free(self, path: Path) -> None:
        if _real(path) not in self._locks and in_use(path):
            raise UsageError(
                f"another dialogue keeps its conversation in {path}; choose another name"
            )

    def _recovery_file(self) -> Path:
        if self._recovery is None:
            name = time.strftime(f"recovery-%Y%m%d-%H%M%S-{os.getpid()}.json")
            self._recovery = state_folder() / name
        return self._recovery

    def _own(self, path: Path) -> None:
        """Lock it, as a sign to other dialogues that it is in use."""
        if (file := _locked(path)) is not None:
            before, self._locks[_real(path)] = self._locks.get(_real(path)), file
            if before is not None:  # the file that was replaced
                before.close()


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _locked(path: Path) -> BinaryIO | None:
    """The file, locked until it is closed; None if another process has it."""
    with suppress(OSError):
        file = path.open("rb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise
        return file
    return None
