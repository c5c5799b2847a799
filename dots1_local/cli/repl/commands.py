"""The commands of a dialogue, and the settings that /set changes."""

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dots1_local.cli._output import notice, one_line, plain
from dots1_local.cli.repl.autosave import resume
from dots1_local.cli.repl.line_editor import (
    edit_text,
    message_from,
    read_text,
    typed_as,
    typed_path,
)
from dots1_local.cli.repl.loop import Command, Repl
from dots1_local.errors import UsageError
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from dots1_local.chat.dialogue import Dialogue
    from dots1_local.chat.message import AnswerStats
    from dots1_local.engine.log import Difference

__all__ = ["COMMANDS"]


def _help(repl: Repl, rest: str) -> None:
    _notice_table((f"{each.name} {each.arguments}", each.help) for each in repl.commands)
    notice(
        '\n"""   begins a message of several lines, which ends with """\n'
        "Ctrl-C stops an answer; Ctrl-D leaves"
    )


def _exit(repl: Repl, rest: str) -> None:
    repl.done = True


def _clear(repl: Repl, rest: str) -> None:
    repl.session.clear()
    repl.attached.clear()
    notice("a new conversation")


def _regenerate(repl: Repl, rest: str) -> None:
    repl.answer(
        lambda progress: repl.session.regenerate(progress=progress),
        "stopped; the last answer stays",
    )


def _undo(repl: Repl, rest: str) -> None:
    dropped = repl.session.undo()
    if dropped is None:
        raise UsageError("there is no turn to drop")
    notice(f"dropped: {one_line(dropped.text)}")


def _edit(repl: Repl, rest: str) -> None:
    before, dropped = list(repl.session.messages), repl.session.dropped
    last = next((each.text for each in reversed(before) if each.role == "user"), None)
    if last is None:
        raise UsageError("there is no message to edit")
    text = edit_text(last)
    if text is None:
        text = message_from(repl.editor.read(typed_as(last)))
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
            repl.session.messages, repl.session.dropped = before, dropped
            repl.autosave.save()


def _system(repl: Repl, rest: str) -> None:
    if rest:
        repl.session.system = "" if rest in ("''", '""') else rest
    notice(f"system prompt: {plain(repl.session.system) or 'none'}")


def _save(repl: Repl, rest: str) -> None:
    repl.autosave.save_as(_conversation_path(rest))


def _load(repl: Repl, rest: str) -> None:
    from dots1_local.chat.conversation import load_conversation

    path, before = _conversation_path(rest), dict(_values(repl))
    conversation = load_conversation(path)
    resume(path, conversation, repl.session)
    repl.resume(path, conversation)
    changed = [f"{name} {value}" for name, value in _values(repl) if value != before[name]]
    if changed:
        notice(plain(f"settings now: {', '.join(changed)}"))


def _conversation_path(rest: str) -> Path:
    """Return the typed path, with .json if it has no suffix."""
    path = typed_path(rest)
    if path.name in ("", ".."):
        raise UsageError(f"{rest} is not a file name")
    return path if path.suffix else path.with_name(f"{path.name}.json")


def _read(repl: Repl, rest: str) -> None:
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
    notice(f"{path}: {_length(repl.session, text)}, which go with your next message")


def _length(session: "Dialogue", *texts: str) -> str:
    """Return the length in tokens, or in characters if the session cannot count tokens."""
    counts = [session.count(text) for text in texts]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return f"{sum(map(len, texts)):,} characters"
    return f"{sum(known):,} tokens"


def _show(repl: Repl, rest: str) -> None:
    session = repl.session
    said = [message.text for message in session.messages if message.role != "system"]
    context = "unknown" if session.n_ctx is None else f"{session.n_ctx:,} tokens"
    dropped = f" ({session.dropped} no longer in the context)" if session.dropped else ""
    if session.context_used is not None:
        context += f", {session.context_used:,} of them used"
    _notice_table(
        [
            ("model", session.title),
            *_memory(session.memory),
            ("context", context),
            ("turns", f"{len(said) // 2}{dropped}, {_length(session, *said)} of text"),
            ("attached", ", ".join(repl.attached) or "none"),
            ("system", one_line(session.system) or "none"),
            *_values(repl),
        ]
    )


def _memory(found: Iterable["Difference"]) -> Iterator[tuple[str, str]]:
    """Yield a row for each device: its classes of bytes, and their sum as planned."""
    for device, group in groupby(found, key=lambda each: each.device):
        classes = list(group)
        sizes = ", ".join(f"{human_bytes(each.real)} {each.what}" for each in classes)
        planned = sum(each.predicted for each in classes)
        yield f"on {device}", f"{sizes}; planned {human_bytes(planned)}" if planned else sizes


def _stats(repl: Repl, rest: str) -> None:
    if not repl.answers:
        raise UsageError("there is no answer yet")
    _notice_table([*_figures(repl.answers[-1]), ("all answers", _totals(repl.answers))])


def _figures(last: "AnswerStats") -> Iterator[tuple[str, str]]:
    """Yield the figures of an answer, except those that a server does not report."""
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
    if last.drafted_tokens:
        yield "drafts", f"{last.drafted_tokens:,} tokens, {last.accepted_tokens:,} of them right"


def _totals(answers: Sequence["AnswerStats"]) -> str:
    counts = [each.read_tokens for each in answers]
    known = [count for count in counts if count is not None]
    read = f"{sum(known):,} read, " if len(known) == len(counts) else ""
    about = "about " if any(each.estimate for each in answers) else ""
    written = sum(each.generated_tokens for each in answers)
    seconds = sum(each.prompt_seconds + each.generation_seconds for each in answers)
    return f"{len(answers)}: {read}{about}{written:,} written, {seconds:,.1f} s"


def _notice_table(rows: Iterable[tuple[str, str]]) -> None:
    pairs = [(left.strip(), right) for left, right in rows]
    width = max(len(left) for left, _ in pairs)
    for left, right in pairs:
        notice(plain(f"{left:{width}}  {right}"))


@dataclass(frozen=True)
class _Setting:
    """A setting of the sampling, the session or the repl.

    `parse` raises ValueError for a text that is not what `takes` describes.
    """

    name: str
    takes: str
    parse: Callable[[str], Any]
    owner: Literal["sampling", "session", "repl"] = "sampling"


def _seed(text: str) -> int | None:
    return None if text in ("off", "none", "random") else int(text)


def _count(text: str) -> int | None:
    count = _seed(text)
    if count is not None and count < 1:
        raise ValueError
    return count


def _strings(text: str) -> tuple[str, ...]:
    r"""Parse words or quoted strings, in which \n is a new line."""
    if text in ("off", "none"):
        return ()
    words = shlex.shlex(text, posix=True)
    words.whitespace_split, words.escape, words.commenters = True, "", ""
    strings = tuple(word.replace("\\n", "\n") for word in words)
    if not all(strings):
        raise ValueError
    return strings


def _choice(**choices: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if text not in choices:
            raise ValueError
        return choices[text]

    return parse


_SETTINGS = (
    _Setting("temperature", "a number from 0 up", float),
    _Setting("top_k", "a whole number, 0 for off", int),
    _Setting("top_p", "a share of 1", float),
    _Setting("min_p", "a share of 1", float),
    _Setting("repeat_penalty", "a number above 0, 1 for off", float),
    _Setting("seed", "a whole number or random", _seed),
    _Setting("max_tokens", "a whole number from 1 up or off", _count, "session"),
    _Setting("stop", "strings, quoted if they have spaces, or none", _strings, "session"),
    _Setting("overflow", "drop or stop", _choice(drop="drop", stop="stop"), "session"),
    _Setting("markdown", "on or off", _choice(on=True, off=False), "repl"),
)


def _set(repl: Repl, rest: str) -> None:
    name, *value = re.split(r"\s+|=", rest, maxsplit=1)
    if value and value[0]:
        _change(repl, _find_setting(name), value[0])
    chosen = _find_setting(name).name if name else None
    _notice_table(pair for pair in _values(repl) if chosen in (None, pair[0]))


def _find_setting(name: str) -> _Setting:
    """Find a setting by its name, or by the beginning of exactly one name."""
    wanted = name.replace("-", "_")
    found = [each for each in _SETTINGS if each.name.startswith(wanted)]
    if len(found) != 1:
        known = ", ".join(each.name for each in found or _SETTINGS)
        raise UsageError(f"there is no setting {name!r}; choose from {known}")
    return found[0]


def _change(repl: Repl, setting: _Setting, text: str) -> None:
    try:
        value = setting.parse(text)
    except (ValueError, OverflowError):
        raise UsageError(f"{setting.name} must be {setting.takes}, not {text!r}") from None
    if setting.owner == "sampling":
        repl.session.sampling = replace(repl.session.sampling, **{setting.name: value})
    else:
        setattr(_owner(repl, setting), setting.name, value)


def _values(repl: Repl) -> Iterator[tuple[str, str]]:
    """Yield the name and the present value of each setting."""
    for setting in _SETTINGS:
        yield setting.name, _format(setting, getattr(_owner(repl, setting), setting.name))


def _owner(repl: Repl, setting: _Setting) -> Any:
    owners = {"sampling": repl.session.sampling, "session": repl.session, "repl": repl}
    return owners[setting.owner]


def _format(setting: _Setting, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if setting.name == "stop":
        return " ".join(json.dumps(each, ensure_ascii=False) for each in value) or "none"
    if value is None:
        return "random" if setting.name == "seed" else "off"
    return str(value)


COMMANDS = (
    Command("/help", ("/?", "/h"), "", "list the commands", _help),
    Command("/exit", ("/bye", "/quit", "/q"), "", "leave, as Ctrl-D does", _exit),
    Command("/clear", ("/new", "/reset"), "", "begin a new conversation", _clear),
    Command("/regen", ("/retry",), "", "answer the last question again", _regenerate),
    Command("/undo", (), "", "drop the last question and its answer", _undo),
    Command("/edit", (), "", "change the last question in $EDITOR and ask again", _edit),
    Command("/system", (), "[TEXT]", "show or replace the system prompt; '' for none", _system),
    Command(
        "/set", (), "[NAME [VALUE]]", "show or change settings", _set,
        tuple(setting.name for setting in _SETTINGS),
    ),
    Command("/show", ("/info",), "", "show model, context and settings", _show),
    Command("/save", (), "NAME", "save the conversation", _save, "path"),
    Command("/load", (), "NAME", "resume a saved conversation", _load, "path"),
    Command("/read", ("/file",), "[FILE]", "attach a text file, or none", _read, "path"),
    Command("/stats", (), "", "show tokens and speeds", _stats),
)  # fmt: skip
