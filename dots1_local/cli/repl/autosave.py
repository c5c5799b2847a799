"""Conversations in files: saved by name with their KV cache, and automatically as they grow.

Whatever ends the process, the conversation is kept: in the session's file, or in a recovery file
that is removed when the dialogue ends well. A locked file tells other processes that it is in use.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dots1_local.cli._output import notice, one_line, plural, progress_bar
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.partial_file import (
    check_target,
    open_locked,
    partial_path,
    remove_abandoned,
)
from dots1_local.files.user_folder import user_folder
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from dots1_local.chat.conversation import Conversation
    from dots1_local.chat.dialogue import Dialogue
    from dots1_local.chat.message import Message

__all__ = [
    "AutoSave", "find_session", "in_use", "resume", "save", "save_at_end", "unfinished_sessions",
]  # fmt: skip


def save(path: Path, session: "Dialogue", *, quiet: bool = False) -> None:
    """Write the conversation to `path`, and its KV cache beside it.

    If the KV cache cannot be written, that is a notice. `quiet` leaves out the notice of success.

    Raises:
        UsageError: the conversation cannot be written there.
    """
    from dots1_local.chat.conversation import save_conversation, state_path
    from dots1_local.chat.kv_state import drop_state

    continues = _continues(path, session)
    save_conversation(path, session)
    if not continues:
        drop_state(state_path(path))
    remove_abandoned([partial_path(_real(state_path(path)))])
    try:
        with progress_bar("saving") as report:
            nbytes = session.save_state(state_path(path), report)
    except Dots1Error as error:
        notice(f"saved as {path}, but without its KV cache: {error}")
        return
    cache = f" with {human_bytes(nbytes)} of KV cache in {state_path(path)}" if nbytes else ""
    if not quiet:
        notice(f"saved as {path}{cache}")


def _continues(path: Path, session: "Dialogue") -> bool:
    """Return whether the session continues the conversation in the file, so the cache fits."""
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
    """Put the session where the conversation of `path` was, with as much KV cache as fits."""
    from dots1_local.chat.conversation import state_path

    conversation.apply(session)
    with progress_bar("reading the KV cache"):
        cached = session.load_state(state_path(path))
    if not quiet:
        notice(f"{path}: {_summary(conversation, session, cached)}")


def _summary(conversation: "Conversation", session: "Dialogue", cached: int) -> str:
    turns = [message.text for message in conversation.messages if message.role == "user"]
    parts = [plural(len(turns), "turn")]
    if conversation.dropped:
        parts.append(f"{conversation.dropped} of them no longer in the context")
    if cached:
        parts.append(f"{cached:,} tokens of it cached")
    if conversation.model != session.model:
        parts.append(f"held with {one_line(conversation.model)}")
    summary = ", ".join(parts)
    if conversation.unanswered:
        return f"{summary}; not answered yet: {one_line(conversation.unanswered)}"
    return f"{summary}; the last: {one_line(turns[-1])}" if turns else summary


def find_session(file: Path | None) -> Path | None:
    """Return the session's file if it exists; else check that the file can be made.

    Raises:
        UsageError: another dialogue uses the file.
        Dots1Error: the file cannot be made.
    """
    if file and not file.exists():
        check_target(file, force=True)
        return None
    if file and in_use(file):
        raise UsageError(f"another dialogue uses {file}; leave it first, or name another file")
    return file


@contextmanager
def save_at_end(session: "Dialogue", file: Path | None) -> Iterator[None]:
    """Save what is answered within, even if only in part or if llama.cpp aborts the process."""
    from dots1_local.chat.conversation import save_conversation
    from dots1_local.chat.turns import last_turn
    from dots1_local.engine.abort import on_abort

    def rescue(reason: str) -> str:
        if file is None or last_turn(session.so_far) is None:
            return reason
        save_conversation(file, session, session.so_far)
        return f"{reason}; what was said is in {file}"

    with on_abort(rescue):
        try:
            yield
        finally:
            if file and session.stats is not None:
                save(file, session, quiet=not sys.stderr.isatty())


def unfinished_sessions() -> list[Path]:
    """Return the recovery files of dialogues that did not end well, the latest last.

    A recovery file with a KV cache beside it does not count, because a person saved in it.
    """
    from dots1_local.chat.conversation import state_path

    try:
        found = sorted(user_folder("state").glob("recovery-*.json"))
        return [path for path in found if not state_path(path).exists() and not in_use(path)]
    except (OSError, RuntimeError):
        return []


class AutoSave:
    """Saves a dialogue as it grows: in `file`, or else in a recovery file until a good end."""

    def __init__(self, session: "Dialogue", file: Path | None = None) -> None:
        self._session, self._file = session, file
        self._recovery: Path | None = None
        self._locks: dict[Path, ExitStack] = {}  # by real path
        self._warned = False
        if file:
            self._claim(file)

    def save(self, messages: Sequence["Message"] | None = None) -> Path | None:
        """Write the conversation, or other `messages`, if it has a turn; return the file.

        If `file` cannot be written, there is a notice, and the recovery file is used.
        """
        from dots1_local.chat.turns import last_turn

        messages = self._session.messages if messages is None else messages
        if last_turn(messages) is None:
            return None
        if self._file:
            problem = self._write(self._file, messages)
            if problem is None:
                return self._file
            if not self._warned:
                notice(problem)
                self._warned = True
        with suppress(OSError, RuntimeError):
            recovery = self._recovery_file()
            return recovery if self._write(recovery, messages) is None else None
        return None

    def claim(self, path: Path) -> None:
        """Take over a recovery file that was loaded, so that a good end removes it.

        One that was loaded earlier is released, because this is another conversation now.
        """
        kept = {_real(each) for each in (path, self._file, self._recovery) if each}
        for other in self._locks.keys() - kept:
            self._locks.pop(other).close()
        if _real(path) in map(_real, unfinished_sessions()):
            self._claim(path)

    def save_as(self, path: Path) -> None:
        """Save to a file that a person names, with the KV cache; a good end does not remove it.

        Raises:
            UsageError: the conversation cannot be saved there.
        """
        self._check_free(path)
        save(path, self._session)
        if (lock := self._locks.pop(_real(path), None)) is not None:
            lock.close()
        if self._file and _real(path) == _real(self._file):
            self._claim(self._file)

    def finish(self) -> None:
        """Save to `file` with the KV cache, and remove the recovery files.

        Raises:
            UsageError: the conversation cannot be saved there; the recovery files stay.
        """
        from dots1_local.chat.turns import last_turn

        if self._file and (self._file.exists() or last_turn(self._session.messages) is not None):
            self.save_as(self._file)
        for path in self._locks:
            if not self._file or path != _real(self._file):
                with suppress(OSError):
                    path.unlink()
        self.release()

    def release(self) -> None:
        """Leave all files as they are, for others to use."""
        for lock in self._locks.values():
            lock.close()
        self._locks.clear()

    def _write(self, path: Path, messages: Sequence["Message"]) -> str | None:
        """Write the conversation and claim the file; return the error if that failed."""
        from dots1_local.chat.conversation import save_conversation

        try:
            self._check_free(path)
            save_conversation(path, self._session, messages)
        except UsageError as error:
            return str(error)
        self._claim(path)
        return None

    def _check_free(self, path: Path) -> None:
        if _real(path) not in self._locks and in_use(path):
            raise UsageError(
                f"another dialogue keeps its conversation in {path}; choose another name"
            )

    def _recovery_file(self) -> Path:
        if self._recovery is None:
            folder = user_folder("state")
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove_abandoned(folder.glob("recovery-*.json.partial"))
            name = time.strftime(f"recovery-%Y%m%d-%H%M%S-{os.getpid()}.json")
            self._recovery = folder / name
        return self._recovery

    def _claim(self, path: Path) -> None:
        """Lock the file, which may have replaced one that is locked."""
        path, lock = _real(path), ExitStack()
        with suppress(OSError, Dots1Error):
            if path.is_file():
                lock.enter_context(open_locked(path, "in use"))
                before, self._locks[path] = self._locks.get(path), lock
                if before is not None:
                    before.close()


def in_use(path: Path) -> bool:
    """Return whether a dialogue keeps its conversation in this file."""
    if not path.is_file():  # opening a pipe would wait
        return False
    try:
        with open_locked(_real(path), "in use"):
            return False
    except Dots1Error:
        return True
    except OSError:
        return False


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
