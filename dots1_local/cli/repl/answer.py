"""Print one answer: stream it to stdout, stop it at Ctrl-C, and report how it went."""

import os
import signal
import sys
import termios
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from shutil import get_terminal_size
from typing import TYPE_CHECKING, TextIO

from dots1_local.cli._output import ControlFilter, notice, progress_bar
from dots1_local.errors import Dots1Error
from dots1_local.progress import Progress

if TYPE_CHECKING:
    from dots1_local.chat.dialogue import Dialogue
    from dots1_local.chat.message import AnswerStats

__all__ = [
    "Ask", "NotAnswered", "echo_controls", "interrupts", "notify", "print_answer", "print_status",
    "stream",
]  # fmt: skip

Ask = Callable[[Progress], Generator[str, None, None]]

_LONG_PROMPT = 512  # tokens in a ubatch of the engine, which reports nothing before the first one


class NotAnswered(Exception):
    """Ctrl-C came before the first word of an answer."""


def print_answer(ask: Ask, *, markdown: bool) -> None:
    """Stream an answer to stdout; `markdown` is rendered on a terminal only.

    Raises:
        NotAnswered: the answer was stopped before its first word.
        Dots1Error: `ask` raised it, or stdout cannot be written to.
    """
    with _printer(markdown and _shows_colours(sys.stdout)) as write:
        stream(ask, write)


def stream(ask: Ask, write: Callable[[str], None]) -> None:
    """Pass the pieces of an answer to `write`, with a progress bar while a long prompt is read.

    Ctrl-C sets a flag that is checked between tokens and between ubatches, so that no exception
    passes through the engine.

    Raises:
        NotAnswered: the answer was stopped before its first word.
    """
    answered, reading = False, True
    bars: list[Progress] = []
    with interrupts() as interrupted, ExitStack() as bar, suppress(NotAnswered):

        def report(done: int, total: int, unit: str, what: str) -> None:
            if interrupted():
                raise NotAnswered
            if reading and not bars and total > _LONG_PROMPT:
                bars.append(bar.enter_context(progress_bar("reading")))
            for update in bars:
                update(done, total, unit, "")

        with closing(ask(report)) as answer:
            for piece in answer:
                reading = False  # if the context overflows later, reading again has no bar
                bars.clear()
                bar.close()
                if piece:
                    answered = True
                    write(piece)
                if interrupted():
                    break
    if interrupted() and not answered:
        raise NotAnswered


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C instead of raising KeyboardInterrupt; yield whether it came."""
    noted = False

    def note(*_: object) -> None:
        nonlocal noted
        noted = True

    handler = signal.signal(signal.SIGINT, note)
    echoed = echo_controls(False)
    try:
        yield lambda: noted
    finally:
        echo_controls(echoed)
        signal.signal(signal.SIGINT, handler)


def echo_controls(on: bool) -> bool:
    """Let the terminal write ^C into what is shown, or not; return whether it did before."""
    if not sys.stdin.isatty():
        return on
    attributes = termios.tcgetattr(sys.stdin)
    before = bool(attributes[3] & termios.ECHOCTL)
    attributes[3] = attributes[3] & ~termios.ECHOCTL | termios.ECHOCTL * on
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, attributes)
    return before


@contextmanager
def _printer(markdown: bool) -> Iterator[Callable[[str], None]]:
    """Write what a model says to stdout, without terminal control and with a newline at the end."""
    last = "\n"

    def write(text: str) -> None:
        nonlocal last
        if text:
            _write(text)
            last = text[-1]

    harmless, feed = ControlFilter(), write
    with ExitStack() as finishing:
        finishing.callback(lambda: write("" if last == "\n" else "\n"))
        if markdown:
            from dots1_local.cli.repl.markdown import MarkdownStream

            rendered = MarkdownStream(get_terminal_size().columns, write)
            feed = rendered.feed
            finishing.callback(rendered.finish)
        yield lambda piece: feed(harmless.feed(piece))


def _write(text: str) -> None:
    """Write to stdout at once, with a question mark for what its encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # it is not an error if the reader has left
    except OSError as error:
        raise Dots1Error(f"cannot write the answer: {error.strerror}") from None


def notify(stats: "AnswerStats", n_ctx: int | None) -> None:
    """Print a notice if an answer did not simply end, or if older turns were dropped."""
    if stats.dropped_turns == 1:
        notice("the oldest turn no longer fits, and was dropped from the context")
    elif stats.dropped_turns:
        notice(
            f"the {stats.dropped_turns} oldest turns no longer fit, and were dropped "
            "from the context"
        )
    if stats.stop == "context":
        size = f" of {n_ctx:,} tokens" if n_ctx else ""
        notice(f"the context{size} is full; the answer is cut off")
    elif stats.stop == "length" and sys.stderr.isatty():  # a script asked for it
        notice(f"the answer is cut off after {stats.generated_tokens:,} tokens (max_tokens)")
    elif stats.stop == "interrupted":
        notice("interrupted; what was written is kept")
    elif not stats.generated_tokens:
        notice("the model ended its answer at once")


def print_status(session: "Dialogue") -> None:
    """Print tokens and speeds of the last answer, dim, if stderr is a terminal."""
    stats = session.stats
    if stats is None or not sys.stderr.isatty():
        return
    parts = []
    if stats.read_tokens is not None:
        parts.append(f"read {stats.read_tokens:,} at {stats.prompt_speed:,.1f} tok/s")
    else:  # part of the prompt may have been cached
        prompt = "" if stats.prompt_tokens is None else f"prompt {stats.prompt_tokens:,}, "
        parts.append(f"{prompt}first word after {stats.prompt_seconds:,.1f} s")
    about = "about " if stats.estimate else ""
    parts.append(f"wrote {about}{stats.generated_tokens:,} at {stats.generation_speed:,.1f} tok/s")
    if session.context_used is not None:
        size = f" of {session.n_ctx:,}" if session.n_ctx else ""
        parts.append(f"context {session.context_used:,}{size}")
    line = " · ".join(parts)
    notice(f"\033[2m{line}\033[0m" if _shows_colours(sys.stderr) else line)


def _shows_colours(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that shows colours, and the user allows them."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
