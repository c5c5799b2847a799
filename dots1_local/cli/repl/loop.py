"""The loop of a dialogue: a line in, a command carried out or an answer streamed."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dots1_local.cli._output import notice
from dots1_local.cli.repl.answer import Ask, NotAnswered, interrupts, show, tell, tell_status
from dots1_local.cli.repl.commands import COMMANDS, run_command
from dots1_local.cli.repl.line_editor import QUOTES, LineEditor
from dots1_local.cli.repl.settings import SETTINGS
from dots1_local.errors import Dots1Error

if TYPE_CHECKING:
    from dots1_local.runtime.session import Session, Stats

__all__ = ["Repl"]


@dataclass
class Repl:
    """A dialogue and what its commands act on; `attached` files go with the next message."""

    session: "Session"
    markdown: bool = True
    attached: dict[str, str] = field(default_factory=dict)
    answers: list["Stats"] = field(default_factory=list)
    done: bool = False

    def run(self) -> None:
        """Take lines until /exit, or Ctrl-D on an empty one; no error ends it."""
        self.editor = LineEditor(COMMANDS, [setting.name for setting in SETTINGS])
        with interrupts():  # impatient Ctrl-C must not end it between an answer and the prompt
            while not self.done:
                self._turn()

    def _turn(self) -> None:
        try:
            self._take(self.editor.read())
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
        ):
            self.attached.clear()

    def answer(self, ask: Ask, unanswered: str) -> bool:
        """Show an answer and how it went; whether it is part of the conversation now.

        Where Ctrl-C came before its first word it is not, and `unanswered` is said.
        """
        before = list(self.session.messages)
        try:
            show(ask, markdown=self.markdown)
        except NotAnswered:
            self.session.messages = before
            notice(unanswered)
            return False
        if self.session.stats is not None:
            self.answers.append(self.session.stats)
            tell(self.session.stats, self.session.n_ctx)
            tell_status(self.session)
        return True


def _message(entered: str) -> str:
    """What is sent: without the quotes of a block, or the space that keeps a slash from acting."""
    if entered.startswith(QUOTES):
        entered = entered.rstrip().removeprefix(QUOTES).removesuffix(QUOTES)
    elif entered.startswith((" /", f" {QUOTES}")):
        entered = entered[1:]
    return entered.strip("\n") if entered.strip() else ""
