"""The loop of a dialogue: a line in, a command carried out or an answer streamed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dots1_local.cli._output import notice
from dots1_local.cli.repl.answer import (
    Ask,
    NotAnswered,
    interrupts,
    show,
    show_caret,
    tell,
    tell_status,
)
from dots1_local.cli.repl.autosave import Keeper
from dots1_local.cli.repl.commands import COMMANDS, run_command
from dots1_local.cli.repl.line_editor import QUOTES, LineEditor
from dots1_local.cli.repl.settings import SETTINGS
from dots1_local.errors import Dots1Error

if TYPE_CHECKING:
    from dots1_local.chat.conversation import Conversation
    from dots1_local.chat.dialogue import Dialogue
    from dots1_local.chat.message import AnswerStats

__all__ = ["Repl"]


@dataclass
class Repl:
    """A dialogue and what its commands act on; `attached` files go with the next message.

    The conversation is kept in `file`, or else until a good end in a recovery file. `draft` is
    what the next line begins with.
    """

    session: "Dialogue"
    markdown: bool = True
    file: Path | None = None
    attached: dict[str, str] = field(default_factory=dict)
    answers: list["AnswerStats"] = field(default_factory=list)
    draft: str = ""
    done: bool = False

    def __post_init__(self) -> None:
        self.keeper = Keeper(self.session, self.file)

    def run(self) -> None:
        """Take lines until /exit, or Ctrl-D on an empty one; no error ends it."""
        from dots1_local.engine.abort import handling

        self.editor = LineEditor(COMMANDS, [setting.name for setting in SETTINGS])
        with interrupts(), handling(self._rescue):  # Ctrl-C must not end it between its turns
            while not self.done:
                self._turn()
            try:
                self.keeper.end()
            except Dots1Error as error:
                notice(str(error))

    def take_up(self, path: Path, conversation: "Conversation") -> None:
        """Go on with what was loaded from `path`: a question without an answer can be asked."""
        self.keeper.adopt(path)
        self.draft = _as_entered(conversation.unanswered)

    def _rescue(self, reason: str) -> None:
        """The engine ends the process."""
        path = self.keeper.keep(self.session.so_far)
        show_caret()
        kept = f"; /load {path} goes on from here" if path else ""
        notice(f"\ndots1: {reason}{kept}")

    def _turn(self) -> None:
        try:
            draft, self.draft = self.draft, ""
            self._take(self.editor.read(draft))
        except EOFError:
            self.done = True
        except KeyboardInterrupt:
            notice("Ctrl-D or /exit leaves.")
        except Dots1Error as error:
            notice(str(error))

    def _take(self, entered: str) -> None:
        if entered.startswith("/"):
            run_command(self, entered)
            return
        text = _message(entered)
        if not text:
            return
        whole = "\n\n".join([*self.attached.values(), text])
        if self.answer(
            lambda progress: self.session.ask(whole, progress=progress),
            "stopped; the question is no part of the conversation (arrow-up brings it back)",
            whole,
        ):
            self.attached.clear()

    def answer(self, ask: Ask, unanswered: str, question: str = "") -> bool:
        """Show an answer and how it went; whether it is part of the conversation now.

        Where Ctrl-C came before its first word it is not, and `unanswered` is said. `question` is
        what is asked, if it is new.
        """
        from dots1_local.chat.message import Message

        before = list(self.session.messages)
        self.keeper.keep([*before, Message("user", question)] if question else before)
        try:
            show(ask, markdown=self.markdown)
        except NotAnswered:
            self.session.messages = before
            notice(unanswered)
            return False
        finally:
            self.keeper.keep()
        if self.session.stats is not None:
            self.answers.append(self.session.stats)
            tell(self.session.stats, self.session.n_ctx)
            tell_status(self.session)
        return True


def _as_entered(text: str) -> str:
    """What `_message` makes `text` of."""
    return f" {text}" if text.startswith(("/", QUOTES)) else text


def _message(entered: str) -> str:
    """What is sent: without the quotes of a block, or the space that keeps a slash from acting."""
    if entered.startswith(QUOTES):
        entered = entered.rstrip().removeprefix(QUOTES).removesuffix(QUOTES)
    elif entered.startswith((" /", f" {QUOTES}")):
        entered = entered[1:]
    return entered.strip("\n") if entered.strip() else ""
