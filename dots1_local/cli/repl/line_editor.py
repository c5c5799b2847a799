"""The files that commands name, and the text in them.

The line a person types: editing, history, completion and messages of several lines.

The person's own editor on a piece of text.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.output.plain_text import PlainTextOutput
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.utils import is_dumb_terminal

from dots1_local.cli._plain import ControlFilter
from dots1_local.errors import UsageError

if TYPE_CHECKING:
    from dots1_local.cli.repl.commands import Command

__all__ = [
    "QUOTES",
    "LineEditor",
    "conversation_path",
    "edit_text",
    "editor_command",
    "read_text",
    "state_folder",
    "typed_path",
]


_LARGEST_FILE = 4 << 20  # bytes; a context of 32,768 tokens holds some 150 kB of English


def typed_path(rest: str) -> Path:
    """A path as it is typed: quoted, escaped, or plain with spaces.

    Raises:
        UsageError: there is none, or one that would steer the terminal when it is shown.
    """
    try:
        words = shlex.split(rest)
    except ValueError:
        words = []
    name = words[0] if len(words) == 1 else rest
    if not name:
        raise UsageError("a file name is missing")
    if ControlFilter().feed(name) != name:
        raise UsageError("file names with control characters are not taken")
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UsageError(f"there is no such home folder: {name}") from None


def conversation_path(rest: str) -> Path:
    """The same, with .json where it has no ending.

    Raises:
        UsageError: there is none.
    """
    path = typed_path(rest)
    if path.name in ("", ".."):
        raise UsageError(f"{rest} is no file name")
    return path if path.suffix else path.with_name(f"{path.name}.json")


def state_folder() -> Path:
    """The person's own folder for what outlives a dialogue, in the XDG state folder; it is there.

    Raises:
        OSError: it cannot be made.
        RuntimeError: there is no home folder.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state if os.path.isabs(state) else "~/.local/state").expanduser() / "dots1"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def read_text(path: Path) -> str:
    """The text of a file of bearable size.

    Raises:
        UsageError: no file, unreadable, too long for any context, or not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or a terminal would be waited for
            raise UsageError(f"{path} is not a file")
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > _LARGEST_FILE:
        raise UsageError(f"{path} is longer than {_LARGEST_FILE:,} bytes; no context holds that")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text (at byte {error.start:,})") from None


QUOTES = '"""'


class LineEditor:
    """Reads what a person enters; everything it shows goes to the terminal, never to a pipe."""

    def __init__(self, commands: Sequence["Command"], settings: Sequence[str]) -> None:
        with create_app_session(output=_terminal()):  # given itself, it would not see a dumb one
            self._prompt: PromptSession[str] = PromptSession(
                "> ",
                multiline=Condition(lambda: _is_open(self._prompt.default_buffer.text)),
                prompt_continuation=lambda width, line, wrapped: "  " if wrapped else ". ",
                history=_history(),
                completer=_CommandCompleter(commands, settings),
                complete_while_typing=False,
                complete_style=CompleteStyle.READLINE_LIKE,
                key_bindings=_keys(),
                enable_suspend=True,
            )

    def read(self, draft: str = "") -> str:
        """What was entered, maybe several lines; it begins as `draft`.

        Raises:
            EOFError: Ctrl-D on an empty line.
            KeyboardInterrupt: Ctrl-C on an empty line; elsewhere it clears the line.
        """
        text = self._prompt.prompt(default=draft, handle_sigint=False)  # Ctrl-C is a key here
        return text.encode("utf-8", errors="replace").decode()  # bytes that are no UTF-8


def _terminal() -> Output:
    stream = next((each for each in (sys.stderr, sys.stdout) if each.isatty()), sys.stderr)
    return PlainTextOutput(stream) if is_dumb_terminal() else create_output(stream)


def _is_open(text: str) -> bool:
    """Whether a quoted message has begun and not ended, so that Enter makes a new line."""
    ended = len(text.rstrip()) >= 2 * len(QUOTES) and text.rstrip().endswith(QUOTES)
    return text.startswith(QUOTES) and not ended


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("c-c", filter=has_focus(DEFAULT_BUFFER))
    def clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys


class _History(FileHistory):
    """A disk that fills up costs the history, not the conversation."""

    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeError):
            super().store_string(string)


def _history() -> History:
    """The person's own file in the XDG state folder, or none where that cannot be written."""
    try:
        path = state_folder() / "history"
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, mode=0o600))
        path.chmod(0o600)
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return InMemoryHistory()
    return _History(path)


class _CommandCompleter(Completer):
    """Names of commands, then whatever the command wants next."""

    def __init__(self, commands: Sequence["Command"], settings: Sequence[str]) -> None:
        self._commands, self._settings = commands, settings
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterator[Completion]:
        word, space, rest = document.text_before_cursor.partition(" ")
        if not word.startswith("/"):
            return
        if not space:
            yield from _starting(word, (command.name for command in self._commands))
            return
        wants = {name: each.completes for each in self._commands for name in each.names}.get(word)
        if wants == "path":
            rest = rest.lstrip()
            yield from self._paths.get_completions(Document(rest, len(rest)), complete_event)
        elif wants == "setting" and " " not in rest:
            yield from _starting(rest, self._settings)


def _starting(prefix: str, words: Iterable[str]) -> Iterator[Completion]:
    for word in words:
        if word.startswith(prefix):
            yield Completion(word, start_position=-len(prefix))


def editor_command() -> list[str]:
    """$VISUAL or $EDITOR, as words; none if neither is set.

    Raises:
        UsageError: it has an unclosed quote.
    """
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""
    try:
        return shlex.split(command)
    except ValueError as error:
        raise UsageError(f"the editor {command!r} is no command: {error}") from None


def edit_text(command: list[str], text: str) -> str:
    """What a person makes of `text`, without the newline that editors end a file with.

    Raises:
        UsageError: the editor cannot be run, fails, or leaves what is no UTF-8.
    """
    with TemporaryDirectory(prefix="dots1-") as folder:
        path = Path(folder) / "message.md"
        path.write_text(text, encoding="utf-8")
        try:
            # stdout may be a pipe for answers; an editor wants the terminal.
            status = subprocess.run([*command, str(path)], stdout=sys.stderr, check=False)
            edited = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot edit with {command[0]}: {error}") from None
    if status.returncode:
        raise UsageError(f"{command[0]} ended with status {status.returncode}; nothing is changed")
    return edited.removesuffix("\n")
