"""The loop of a dialogue: read a line, then run a command or stream an answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dots1_local.cli._output import notice, plain
from dots1_local.cli.repl.answer import (
    Ask,
    NotAnswered,
    echo_controls,
    interrupts,
    notify,
    print_answer,
    print_status,
)
from dots1_local.cli.repl.autosave import AutoSave
from dots1_local.cli.repl.line_editor import (
    Completes,
    LineEditor,
    is_command,
    message_from,
    typed_as,
)
from dots1_local.errors import Dots1Error, UsageError

if TYPE_CHECKING:
    from dots1_local.chat.conversation import Conversation
    from dots1_local.chat.dialogue import Dialogue
    from dots1_local.chat.message import AnswerStats

__all__ = ["Command", "Repl"]


@dataclass(frozen=True)
class Command:
    """A command of a dialogue: `run` gets the rest of the line, and Tab offers `completes`."""

    name: str
    aliases: tuple[str, ...]
    arguments: str
    help: str
    run: Callable[["Repl", str], None]
    completes: Completes = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the aliases."""
        return (self.name, *self.aliases)


@dataclass
class Repl:
    """A session, and what commands change beside it.

    The conversation is saved to `file`, or else to a recovery file until a good end. `attached`
    files go with the next message. `draft` is what the next line begins with.
    """

    session: "Dialogue"
    commands: Sequence[Command] = ()
    markdown: bool = True
    file: Path | None = None
    attached: dict[str, str] = field(default_factory=dict)
    answers: list["AnswerStats"] = field(default_factory=list)
    draft: str = ""
    done: bool = False

    def __post_init__(self) -> None:
        self.autosave = AutoSave(self.session, self.file)

    def run(self) -> None:
        """Take lines until /exit, or Ctrl-D on an empty line; no error ends the loop."""
        from dots1_local.engine.abort import on_abort

        completes = {name: each.completes for each in self.commands for name in each.names}
        self.editor = LineEditor([command.name for command in self.commands], completes)
        with interrupts(), on_abort(self._rescue):  # Ctrl-C must not end it between turns
            while not self.done:
                self._turn()
            try:
                self.autosave.finish()
            except Dots1Error as error:
                notice(str(error))

    def resume(self, path: Path, conversation: "Conversation") -> None:
        """Continue what was loaded from `path`, and offer its unanswered question again."""
        self.autosave.claim(path)
        self.draft = typed_as(conversation.unanswered)

    def _rescue(self, reason: str) -> str:
        """Save the conversation when the process has to end; add to the reason where it is."""
        path = self.autosave.save(self.session.so_far)
        echo_controls(True)
        return f"{reason}; /load {path} resumes it" if path else reason

    def _turn(self) -> None:
        try:
            draft, self.draft = self.draft, ""
            entered = self.editor.read(draft)
            if is_command(entered):
                self.run_command(entered)
            elif text := message_from(entered):
                self._ask(text)
        except EOFError:
            self.done = True
        except KeyboardInterrupt:
            notice("Ctrl-D or /exit leaves.")
        except Dots1Error as error:
            notice(str(error))

    def run_command(self, line: str) -> None:
        """Run a line that begins with the name of a command.

        Raises:
            UsageError: there is no such command, or it does not take these arguments.
        """
        name, *others = line.split(maxsplit=1)
        rest = others[0].strip() if others else ""
        command = next((each for each in self.commands if name.lower() in each.names), None)
        if command is None:
            raise UsageError(
                f"there is no command {plain(name)}; /help lists them (to send it, type a space "
                "first)"
            )
        if rest and not command.arguments:
            raise UsageError(f"{name} takes nothing after it")
        command.run(self, rest)

    def _ask(self, text: str) -> None:
        question = "\n\n".join([*self.attached.values(), text])
        if self.answer(
            lambda progress: self.session.ask(question, progress=progress),
            "stopped; the question is not part of the conversation (arrow-up brings it back)",
            question,
        ):
            self.attached.clear()

    def answer(self, ask: Ask, unanswered: str, question: str = "") -> bool:
        """Print an answer and how it went; return whether it is part of the conversation now.

        If Ctrl-C comes before the first word, it is not, and the notice is `unanswered`. `question`
        is what is asked, if it is new.
        """
        from dots1_local.chat.message import Message

        before, dropped = list(self.session.messages), self.session.dropped
        self.autosave.save([*before, Message("user", question)] if question else before)
        try:
            print_answer(ask, markdown=self.markdown)
        except NotAnswered:
            self.session.messages, self.session.dropped = before, dropped
            notice(unanswered)
            return False
        finally:
            self.autosave.save()
        if self.session.stats is not None:
            self.answers.append(self.session.stats)
            notify(self.session.stats, self.session.n_ctx)
            print_status(self.session)
        return True
