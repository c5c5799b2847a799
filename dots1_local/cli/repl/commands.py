"""The commands of a dialogue: a registry of names, help and handlers."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from dots1_local.cli._output import human_bytes, notice
from dots1_local.cli._plain import one_line, plain
from dots1_local.cli.repl.autosave import resume
from dots1_local.cli.repl.line_editor import conversation_path, read_text, typed_path
from dots1_local.cli.repl.settings import change, find_setting, values
from dots1_local.errors import UsageError

if TYPE_CHECKING:
    from dots1_local.chat.dialogue import Dialogue
    from dots1_local.chat.message import AnswerStats
    from dots1_local.cli.repl.loop import Repl
    from dots1_local.engine.report import Difference

__all__ = ["COMMANDS", "Command", "run_command"]


@dataclass(frozen=True)
class Command:
    """`run` gets the rest of the line; `completes` says what Tab offers there."""

    name: str
    aliases: tuple[str, ...]
    arguments: str
    help: str
    run: Callable[["Repl", str], None]
    completes: Literal["path", "setting", "nothing"] = "nothing"

    @property
    def names(self) -> tuple[str, ...]:
        """All it goes by."""
        return (self.name, *self.aliases)


def run_command(repl: "Repl", line: str) -> None:
    """Carry out a line that begins with a slash.

    Raises:
        UsageError: there is no such command, or it does not take these arguments.
    """
    name, *others = line.split(maxsplit=1)
    rest = others[0].strip() if others else ""
    for command in COMMANDS:
        if name.lower() in command.names:
            if rest and not command.arguments:
                raise UsageError(f"{name} takes nothing after it")
            command.run(repl, rest)
            return
    raise UsageError(
        f"there is no command {plain(name)}; /help lists them (to send it, type a space first)"
    )


def _help(repl: "Repl", rest: str) -> None:
    _table((f"{each.name} {each.arguments}", each.help) for each in COMMANDS)
    notice(
        '\n"""   begins a message of several lines, which ends with """\n'
        "Ctrl-C stops an answer; Ctrl-D leaves"
    )


def _exit(repl: "Repl", rest: str) -> None:
    repl.done = True


def _clear(repl: "Repl", rest: str) -> None:
    repl.session.clear()
    repl.attached.clear()
    notice("a new conversation")


def _regenerate(repl: "Repl", rest: str) -> None:
    repl.answer(
        lambda progress: repl.session.regenerate(progress=progress),
        "stopped; the last answer stays",
    )


def _undo(repl: "Repl", rest: str) -> None:
    dropped = repl.session.undo()
    if dropped is None:
        raise UsageError("there is no turn to drop")
    notice(f"dropped: {one_line(dropped.text)}")


def _edit(repl: "Repl", rest: str) -> None:
    from dots1_local.cli.repl.line_editor import edit_text, editor_command

    before = list(repl.session.messages)
    last = next((each.text for each in reversed(before) if each.role == "user"), None)
    if last is None:
        raise UsageError("there is no message to edit")
    command = editor_command()
    text = edit_text(command, last) if command else repl.editor.read(last)
    if not text.strip() or text == last:
        notice("unchanged")
        return
    answered = False
    try:
        repl.session.undo()
        answered = repl.answer(
            lambda progress: repl.session.ask(text, progress=progress),
            "stopped; the conversation is as it was",
            text,
        )
    finally:
        if not answered:
            repl.session.messages = before
            repl.keeper.keep()


def _system(repl: "Repl", rest: str) -> None:
    if rest:
        repl.session.system = "" if rest in ("''", '""') else rest
    notice(f"system prompt: {plain(repl.session.system) or 'none'}")


def _set(repl: "Repl", rest: str) -> None:
    name, *value = re.split(r"\s+|=", rest, maxsplit=1)
    if value and value[0]:
        change(repl, name, value[0])
    chosen = find_setting(name).name if name else None
    _table(pair for pair in values(repl) if chosen in (None, pair[0]))


def _show(repl: "Repl", rest: str) -> None:
    session = repl.session
    said = [message.text for message in session.messages if message.role != "system"]
    _table(
        [
            ("model", session.title),
            *_memory(session.memory),
            ("context", _context(session)),
            ("turns", f"{len(said) // 2}, {_size(session, *said)} of text"),
            ("attached", ", ".join(repl.attached) or "none"),
            ("system", one_line(session.system) or "none"),
            *values(repl),
        ]
    )


def _context(session: "Dialogue") -> str:
    size = "unknown" if session.n_ctx is None else f"{session.n_ctx:,} tokens"
    used = session.context_used
    return size if used is None else f"{size}, {used:,} of them used"


def _size(session: "Dialogue", *texts: str) -> str:
    """In tokens, or in characters where nobody counts tokens."""
    counts = [session.count(text) for text in texts]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return f"{sum(map(len, texts)):,} characters"
    return f"{sum(known):,} tokens"


def _memory(found: Iterable["Difference"]) -> Iterator[tuple[str, str]]:
    """A line for each device: what is there, and its sum as planned."""
    for device, group in groupby(found, key=lambda each: each.device):
        classes = list(group)
        sizes = ", ".join(f"{human_bytes(each.real)} {each.what}" for each in classes)
        planned = sum(each.predicted for each in classes)
        yield f"on {device}", f"{sizes}; planned {human_bytes(planned)}" if planned else sizes


def _save(repl: "Repl", rest: str) -> None:
    repl.keeper.save(conversation_path(rest))


def _load(repl: "Repl", rest: str) -> None:
    from dots1_local.chat.conversation import load_conversation

    path, before = conversation_path(rest), dict(values(repl))
    conversation = load_conversation(path)
    resume(path, conversation, repl.session)
    repl.take_up(path, conversation)
    changed = [f"{name} {value}" for name, value in values(repl) if value != before[name]]
    if changed:
        notice(plain(f"settings now: {', '.join(changed)}"))


def _read(repl: "Repl", rest: str) -> None:
    if not rest:
        repl.attached.clear()
        notice("no file goes with your next message")
        return
    path = typed_path(rest)
    text = f"{path.name}:\n\n{read_text(path)}"
    count, room = repl.session.count(text), repl.session.n_ctx
    if count is not None and room is not None and count >= room:
        raise UsageError(f"{path} is {count:,} tokens long; the context holds {room:,}")
    repl.attached[str(path)] = text
    notice(f"{path}: {_size(repl.session, text)}, which go with your next message")


def _stats(repl: "Repl", rest: str) -> None:
    if not repl.answers:
        raise UsageError("there is no answer yet")
    _table([*_figures(repl.answers[-1]), ("all answers", _all(repl.answers))])


def _figures(last: "AnswerStats") -> Iterator[tuple[str, str]]:
    """Of one answer; what a server does not tell is left out."""
    if last.prompt_tokens is not None:
        cached = "" if last.reused_tokens is None else f", {last.reused_tokens:,} of them cached"
        yield "prompt", f"{last.prompt_tokens:,} tokens{cached}"
    if last.prompt_speed is None:
        yield "first word", f"after {last.prompt_seconds:,.1f} s"
    else:
        yield "read at", f"{last.prompt_speed:,.1f} tok/s"
    about = "about " if last.estimate else ""
    yield "answer", f"{about}{last.generated_tokens:,} tokens, stop reason: {last.stop}"
    yield "written at", f"{last.generation_speed:,.1f} tok/s"


def _all(every: Sequence["AnswerStats"]) -> str:
    counts = [each.read_tokens for each in every]
    known = [count for count in counts if count is not None]
    read = f"{sum(known):,} read, " if len(known) == len(counts) else ""
    about = "about " if any(each.estimate for each in every) else ""
    written = sum(each.generated_tokens for each in every)
    seconds = sum(each.prompt_seconds + each.generation_seconds for each in every)
    return f"{len(every)}: {read}{about}{written:,} written, {seconds:,.1f} s"


def _table(rows: Iterable[tuple[str, str]]) -> None:
    pairs = [(left.strip(), right) for left, right in rows]
    width = max(len(left) for left, _ in pairs)
    for left, right in pairs:
        notice(plain(f"{left:{width}}  {right}"))


COMMANDS = (
    Command("/help", ("/?", "/h"), "", "list the commands", _help),
    Command("/exit", ("/bye", "/quit", "/q"), "", "leave, as Ctrl-D does", _exit),
    Command("/clear", ("/new", "/reset"), "", "begin a new conversation", _clear),
    Command("/regen", ("/retry",), "", "answer the last question again", _regenerate),
    Command("/undo", (), "", "drop the last question and its answer", _undo),
    Command("/edit", (), "", "change the last question in $EDITOR and ask again", _edit),
    Command("/system", (), "[TEXT]", "show or replace the system prompt; '' for none", _system),
    Command("/set", (), "[NAME [VALUE]]", "show or change settings", _set, "setting"),
    Command("/show", ("/info",), "", "show model, context and settings", _show),
    Command("/save", (), "NAME", "save the conversation", _save, "path"),
    Command("/load", (), "NAME", "go on with a saved conversation", _load, "path"),
    Command("/read", ("/file",), "[FILE]", "attach a text file, or none", _read, "path"),
    Command("/stats", (), "", "show tokens and speeds", _stats),
)
