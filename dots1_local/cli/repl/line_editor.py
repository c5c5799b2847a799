"""What a person types: a line with history and completion, a path, or text in an editor."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.output.plain_text import PlainTextOutput
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.utils import is_dumb_terminal

from dots1_local.cli._input import LARGEST_TEXT, check_text
from dots1_local.cli._output import plain
from dots1_local.errors import UsageError
from dots1_local.files.user_folder import user_folder

__all__ = [
    "QUOTES", "Completes", "LineEditor", "edit_text", "is_command", "message_from", "read_text",
    "typed_as", "typed_path",
]  # fmt: skip

QUOTES = '"""'
Completes = Literal["path"] | tuple[str, ...]  # what Tab offers after a command


def is_command(entered: str) -> bool:
    """Whether a line is a command, known or not: a slash begins comments and paths as well."""
    return re.match(r"/(?:[A-Za-z]*|\?)(?:\s|$)", entered) is not None


def message_from(entered: str) -> str:
    """Return the message without its quotes, or without the space that hides what begins it."""
    if entered.startswith(QUOTES):
        entered = entered.rstrip().removeprefix(QUOTES).removesuffix(QUOTES)
    elif entered.startswith(" ") and _needs_space(entered):
        entered = entered[1:]
    return entered.strip("\n") if entered.strip() else ""


def typed_as(message: str) -> str:
    """Return what to type to send the message, the inverse of `message_from`."""
    return f" {message}" if _needs_space(message) else message


def _needs_space(message: str) -> bool:
    return message.lstrip(" ").startswith(("/", QUOTES))


def typed_path(rest: str) -> Path:
    """Return a path that is typed in quotes, with escapes, or as it is.

    Raises:
        UsageError: there is no path, or it has control characters.
    """
    try:
        words = shlex.split(rest)
    except ValueError:
        words = []
    name = words[0] if len(words) == 1 else rest
    if not name:
        raise UsageError("a file name is missing")
    if plain(name) != name:
        raise UsageError("a file name must not have control characters")
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UsageError(f"there is no such home folder: {name}") from None


def read_text(path: Path) -> str:
    """Return the text of a file that may fit in a context.

    Raises:
        UsageError: the file cannot be read, is too long, or is not UTF-8 text.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a terminal would wait
            raise UsageError(f"{path} is not a file")
        with path.open("rb") as file:
            content = file.read(LARGEST_TEXT + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > LARGEST_TEXT:
        raise UsageError(f"{path} is longer than {LARGEST_TEXT:,} bytes; no context holds that")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (at byte {error.start:,})") from None


class LineEditor:
    """Reads lines at the terminal, and writes to nothing else.

    Tab completes `names` of commands, and after a name what `arguments` has for it.
    """

    def __init__(self, names: Sequence[str], arguments: Mapping[str, Completes]) -> None:
        with create_app_session(output=_terminal()):  # a PromptSession misses dumb terminals
            self._prompt: PromptSession[str] = PromptSession(
                "> ",
                multiline=Condition(lambda: _is_open(self._prompt.default_buffer.text)),
                prompt_continuation=lambda width, line, wrapped: "  " if wrapped else ". ",
                history=_history(),
                completer=_CommandCompleter(names, arguments),
                complete_while_typing=False,
                complete_style=CompleteStyle.READLINE_LIKE,
                key_bindings=_keys(),
                enable_suspend=True,
            )

    def read(self, draft: str = "") -> str:
        """Return what is entered, perhaps several lines; the first line begins as `draft`.

        Raises:
            EOFError: Ctrl-D on an empty line.
            KeyboardInterrupt: Ctrl-C on an empty line; on others Ctrl-C clears the line.
            UsageError: what is entered is not in the locale's encoding.
        """
        text = self._prompt.prompt(default=draft, handle_sigint=False)  # Ctrl-C is a key here
        check_text("what you entered", text)
        return text


def _terminal() -> Output:
    stream = next((each for each in (sys.stderr, sys.stdout) if each.isatty()), sys.stderr)
    return PlainTextOutput(stream) if is_dumb_terminal() else create_output(stream)


def _is_open(text: str) -> bool:
    """Return whether a quoted message has not ended, so that Enter begins a new line."""
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

    @keys.add("c-@", filter=has_focus(DEFAULT_BUFFER))
    def ignore(event: KeyPressEvent) -> None:
        """Ctrl-Space switches input methods; Emacs' mark would swallow all that is typed next."""

    @keys.add(Keys.BracketedPaste, filter=has_focus(DEFAULT_BUFFER))
    def paste(event: KeyPressEvent) -> None:
        """Insert what is pasted as text: it begins neither a command nor a quoted message."""
        text, buffer = re.sub(r"\r\n?", "\n", event.data), event.current_buffer
        buffer.insert_text(text if buffer.cursor_position else typed_as(text))

    return keys


class _History(FileHistory):
    """A history whose lines are lost, and nothing else, if the disk is full."""

    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeError):
            super().store_string(string)


def _history() -> History:
    """Return the history in the person's XDG state folder, or in memory if that fails."""
    try:
        folder = user_folder("state")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / "history"
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, mode=0o600))
        path.chmod(0o600)
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return InMemoryHistory()
    return _History(path)


class _CommandCompleter(Completer):
    """Offers names of commands, then what a command takes."""

    def __init__(self, names: Sequence[str], arguments: Mapping[str, Completes]) -> None:
        self._names, self._arguments = names, arguments
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterator[Completion]:
        word, space, rest = document.text_before_cursor.partition(" ")
        if not word.startswith("/"):
            return
        offered = self._arguments.get(word, ()) if space else self._names
        if offered == "path":
            rest = rest.lstrip()
            yield from self._paths.get_completions(Document(rest, len(rest)), complete_event)
        else:
            prefix = rest if space else word
            for found in offered:
                if found.startswith(prefix):
                    yield Completion(found, start_position=-len(prefix))


def edit_text(text: str) -> str | None:
    """Let a person edit `text` in $VISUAL or $EDITOR; None if neither is set.

    The newline that editors put at the end of a file is dropped.

    Raises:
        UsageError: the editor cannot be run, fails, or leaves something that is not UTF-8.
    """
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""
    try:
        command = shlex.split(editor)
    except ValueError as error:
        raise UsageError(f"cannot run the editor {editor!r}: {error}") from None
    if not command:
        return None
    with TemporaryDirectory(prefix="dots1-") as folder:
        path = Path(folder) / "message.md"
        path.write_text(text, encoding="utf-8")
        try:
            # stdout may be a pipe for answers, but an editor needs the terminal.
            status = subprocess.run([*command, str(path)], stdout=sys.stderr, check=False)
            edited = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot edit with {command[0]}: {error}") from None
    if status.returncode:
        raise UsageError(f"{command[0]} ended with status {status.returncode}; nothing is changed")
    return edited.removesuffix("\n")
