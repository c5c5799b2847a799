"""One answer at the terminal or into a pipe: streamed, stopped by Ctrl-C, and told about."""

import os
import signal
import sys
import termios
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from shutil import get_terminal_size
from typing import TYPE_CHECKING, TextIO

from dots1_local.cli._output import notice, progress_bar
from dots1_local.errors import Dots1Error
from dots1_local.progress import Progress, silent

if TYPE_CHECKING:
    from dots1_local.chat.dialogue import Dialogue
    from dots1_local.chat.message import AnswerStats

__all__ = [
    "Ask",
    "NotAnswered",
    "interrupts",
    "show",
    "show_caret",
    "stream",
    "tell",
    "tell_status",
]

Ask = Callable[[Progress], Generator[str, None, None]]

_LONG_PROMPT = 512  # tokens; an engine's ubatch, before which there is nothing to report


class NotAnswered(Exception):
    """Ctrl-C came before the first word of an answer."""


def show(ask: Ask, *, markdown: bool) -> None:
    """Stream an answer to stdout; `markdown` is rendered on a terminal, and raw elsewhere.

    Raises:
        NotAnswered: stopped before the first word.
        Dots1Error: whatever `ask` raises, or stdout cannot be written to.
    """
    with _printer(markdown and _is_colourful(sys.stdout)) as write:
        stream(ask, write)


def stream(ask: Ask, write: Callable[[str], None]) -> None:
    """Hand the pieces of an answer to `write`, with a progress bar while a long prompt is read.

    Ctrl-C only sets a flag, which is looked at between tokens and between ubatches, so that no
    exception flies through the engine.

    Raises:
        NotAnswered: stopped before the first word.
    """
    spoken = False
    with interrupts() as interrupted, closing(_ReadingBar()) as bar, suppress(NotAnswered):

        def report(done: int, total: int, unit: str, what: str) -> None:
            if interrupted():
                raise NotAnswered
            bar.report(done, total, unit)

        with closing(ask(report)) as answer:
            for piece in answer:
                bar.close()
                if piece:
                    spoken = True
                    write(piece)
                if interrupted():
                    break
    if interrupted() and not spoken:
        raise NotAnswered


class _ReadingBar:
    """Shows how far a long prompt is read, until it is closed."""

    def __init__(self) -> None:
        self._shown = ExitStack()
        self._report: Progress | None = None

    def report(self, done: int, total: int, unit: str) -> None:
        if self._report is None and total > _LONG_PROMPT:
            self._report = self._shown.enter_context(progress_bar("reading"))
        if self._report is not None:
            self._report(done, total, unit, "")

    def close(self) -> None:
        self._shown.close()
        self._report = silent  # room made in mid-answer is read again without a bar


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C is only noted, however often it comes; yields whether it did."""
    noted = False

    def note(*_: object) -> None:
        nonlocal noted
        noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        with _without_caret():
            yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _without_caret() -> Iterator[None]:
    """Within, the terminal does not write ^C into what is shown."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~termios.ECHOCTL
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def show_caret() -> None:
    """Let the terminal write ^C again, where the process ends before its time."""
    if sys.stdin.isatty():
        usual = termios.tcgetattr(sys.stdin)
        usual[3] |= termios.ECHOCTL
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, usual)


@contextmanager
def _printer(markdown: bool) -> Iterator[Callable[[str], None]]:
    """Write to stdout what a model says, without terminal control; it ends with a newline."""
    from dots1_local.cli._plain import ControlFilter

    last = "\n"

    def write(text: str) -> None:
        nonlocal last
        if text:
            _write(text)
            last = text[-1]

    harmless = ControlFilter()
    with ExitStack() as finishing:
        finishing.callback(lambda: write("" if last == "\n" else "\n"))
        feed = write
        if markdown:
            from dots1_local.cli._markdown import MarkdownStream

            rendered = MarkdownStream(get_terminal_size().columns, write)
            feed = rendered.feed
            finishing.callback(rendered.finish)
        finishing.callback(lambda: feed(harmless.finish()))
        yield lambda piece: feed(harmless.feed(piece))


def _write(text: str) -> None:
    """To stdout, at once; a question mark stands for what its encoding does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # its reader has left, which is no error
    except OSError as error:
        raise Dots1Error(f"cannot write the answer: {error.strerror}") from None


def tell(stats: "AnswerStats", n_ctx: int | None) -> None:
    """Notices about an answer that did not simply end, or that lost older turns."""
    if stats.dropped_turns == 1:
        notice("the oldest turn no longer fits and was dropped")
    elif stats.dropped_turns:
        notice(f"the {stats.dropped_turns} oldest turns no longer fit and were dropped")
    if stats.stop == "context":
        size = f" of {n_ctx:,} tokens" if n_ctx else ""
        notice(f"the context{size} is full; the answer is cut off")
    elif stats.stop == "length" and sys.stderr.isatty():  # else it is what a script asked for
        notice(f"the answer is cut off after {stats.generated_tokens:,} tokens (max_tokens)")
    elif stats.stop == "interrupted":
        notice("interrupted; what was written is kept")
    elif not stats.generated_tokens:
        notice("the model ended its answer at once")


def tell_status(session: "Dialogue") -> None:
    """Tokens and speeds of the last answer, dim, on a terminal's stderr; a line of 80 columns."""
    stats = session.stats
    if stats is None or not sys.stderr.isatty():
        return
    line = " · ".join([_reading(stats), _writing(stats), *_context(session)])
    notice(f"\033[2m{line}\033[0m" if _is_colourful(sys.stderr) else line)


def _reading(stats: "AnswerStats") -> str:
    """How fast the prompt was read, or how long it took where part of it may have been cached."""
    if stats.read_tokens is not None:
        return f"read {stats.read_tokens:,} at {stats.prompt_speed:,.1f} tok/s"
    prompt = "" if stats.prompt_tokens is None else f"prompt {stats.prompt_tokens:,}, "
    return f"{prompt}first word after {stats.prompt_seconds:,.1f} s"


def _writing(stats: "AnswerStats") -> str:
    about = "about " if stats.estimate else ""
    return f"wrote {about}{stats.generated_tokens:,} at {stats.generation_speed:,.1f} tok/s"


def _context(session: "Dialogue") -> Iterator[str]:
    """How full it is, as far as that is known."""
    if session.context_used is not None:
        size = f" of {session.n_ctx:,}" if session.n_ctx else ""
        yield f"context {session.context_used:,}{size}"


def _is_colourful(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows more than text, and may."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
