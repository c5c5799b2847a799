"""What verbs print: data to stdout, everything else to stderr, colour on a terminal only.

Tables have rules on a terminal and are plain aligned columns in a pipe or a file. `ControlFilter`
drops terminal control from what a model or a file says.
"""

import json
import os
import re
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from shutil import get_terminal_size
from typing import Any

from dots1_local.progress import Progress
from dots1_local.sizes import human_bytes

__all__ = [
    "ControlFilter", "is_verbose", "notice", "notice_resumed", "one_line", "plain", "plural",
    "print_json", "print_sizes", "print_table", "progress_bar", "quiet_drivers", "show_engine_log",
]  # fmt: skip

_QUIET_SECONDS = 30  # after which a line shows that a long job is alive
_PIPE_WIDTH = 10_000  # off a terminal nothing is wrapped or cut, because scripts want whole cells
_LINE_LENGTH = 60  # characters of a text that `one_line` keeps


def notice(message: str) -> None:
    """Print a message on stderr; on a terminal, wrap it between words."""
    if sys.stderr.isatty():
        width = get_terminal_size().columns
        wrap = partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
        lines = message.split("\n")
        message = "\n".join(line if len(line) < width else wrap(line) for line in lines)
    print(message, file=sys.stderr)


def notice_resumed(done: int, total: int, unit: str, what: str) -> None:
    """Print how much of the work an earlier run has done; a `Progress`."""
    notice(f"resuming: {done} of {total} {unit} are done")


def show_engine_log() -> None:
    """Print on stderr what the engine logs, and let drivers print."""
    import logging

    logger = logging.getLogger("dots1_local.engine")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.DEBUG)


def is_verbose() -> bool:
    """Return whether the engine's log is shown."""
    import logging

    return logging.getLogger("dots1_local.engine").isEnabledFor(logging.DEBUG)


@contextmanager
def quiet_drivers() -> Iterator[None]:
    """Drop what C and C++ code prints on stderr within, unless the engine's log is shown.

    Drivers, and in part the engine, print without asking. Our own lines still appear.
    """
    if is_verbose() or os.name != "posix":
        yield
        return
    try:
        stream, kept = sys.stderr, os.dup(2)
    except OSError:  # it is closed
        yield
        return
    with open(kept, "w", 1, encoding=stream.encoding, errors=stream.errors) as ours:
        if _leads_to(stream, 2):  # tests and scripts may have another one
            stream.flush()
            sys.stderr = ours
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        try:
            yield
        finally:
            ours.flush()
            os.dup2(kept, 2)
            sys.stderr = stream


def _leads_to(stream: Any, descriptor: int) -> bool:
    try:
        return bool(stream.fileno() == descriptor)
    except (OSError, ValueError):
        return False


def print_json(value: Any) -> None:
    """Print JSON on stdout, in ASCII if stdout does not take Unicode."""
    readable = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(value, indent=2, ensure_ascii=not readable))


def plural(count: int, noun: str) -> str:
    """Return for example "1 file" or "3 files"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """Show a bar with amount, rate and time left on stderr; off a terminal, a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    def line(text: str) -> TextColumn:
        return TextColumn(text, table_column=Column(no_wrap=True, overflow="ellipsis"))

    console = Console(stderr=True)
    with Bar(
        line("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        line("{task.fields[amount]}"),
        TimeRemainingColumn(),
        line("[dim]{task.fields[what]}"),
        console=console,
        disable=not console.is_terminal or console.is_dumb_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task(label, total=None, amount="", what="")
        printed = time.monotonic()

        def report(done: int, total: int, unit: str, what: str) -> None:
            nonlocal printed
            if bar.disable and time.monotonic() - printed > _QUIET_SECONDS:
                printed = time.monotonic()
                share = f"{done / total:.0%} of {total:,} {unit}" if total else ""
                notice(": ".join(filter(None, (label, share, what))))
            speed = bar.tasks[task].speed or 0
            amount = f"{done:,} of {total:,} {unit}, {speed:,.0f}/s"
            if unit == "bytes":
                sizes = human_bytes(done), human_bytes(total), human_bytes(speed)
                amount = "{} of {}, {}/s".format(*sizes)
            bar.update(task, completed=done, total=total, amount=amount, what=what)

        yield report


def print_sizes(tensors: Iterable[tuple[str, str, int, int]]) -> None:
    """Print the sums of (role, type, parameters, bytes): a row per role and type, and a total.

    Rows are in the order of `ROLES`, then of first appearance. The share is that of the bytes.
    """
    from dots1_local.architecture import ROLES

    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for role, kind, parameters, nbytes in tensors:
        for place, amount in enumerate((1, parameters, nbytes)):
            sums[role, kind][place] += amount
    whole = [sum(column) for column in zip(*sums.values(), strict=True)] or [0, 0, 0]
    order: list[str] = [*ROLES, *(role for role, _ in sums)]
    rows = [
        _size_row(role, kind, counts, whole[2])
        for (role, kind), counts in sorted(sums.items(), key=lambda item: order.index(item[0][0]))
    ]
    header = ("role", "type", "tensors", "parameters", "bytes", "bpw", "share")
    print_table(header, rows, numbers_from=2, total=_size_row("total", "", whole, whole[2]))


def _size_row(role: str, kind: str, counts: Sequence[int], all_bytes: int) -> tuple[str, ...]:
    tensors, parameters, nbytes = counts
    bpw = f"{8 * nbytes / parameters:.3f}" if parameters else "-"
    share = f"{nbytes / all_bytes:.1%}" if all_bytes else "-"
    return role, kind, f"{tensors:,}", f"{parameters:,}", human_bytes(nbytes), bpw, share


def print_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers_from: int,
    total: Sequence[str] | None = None,
) -> None:
    """Print `rows`, and align the columns from `numbers_from` on to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    ruled = console.is_terminal
    table = Table(
        box=box.SIMPLE_HEAD if ruled else None,
        show_edge=False,
        pad_edge=False,
        collapse_padding=ruled,
    )
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place >= numbers_from else "left")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: what a file says is never markup
    if total is not None:
        table.add_section()
        table.add_row(*map(Text, total), style="bold")
    with console.capture() as printed:
        console.print(table)
    print("\n".join(line.rstrip() for line in printed.get().splitlines()))


# Control sequences of ECMA-48, in their 7-bit (ESC) and 8-bit (C1) forms. A string (OSC, DCS, APC,
# PM or SOS) ends at the next sequence, too. A payload longer than 1,024 characters is shown from
# there on, so that an unterminated one cannot swallow an answer.
_SEQUENCE = re.compile(
    r"(?:\x1b[]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x18\x1a\x1b\x90\x98\x9b-\x9f]{0,1024}"
    r"(?P<string_end>[\x07\x18\x1a\x9c])?"
    r"|(?:\x1b\[|\x9b)[ -?]{0,1024}(?P<csi_end>[@-~])?"
    r"|\x1b[ -/]{0,1024}(?P<escape_end>[0-~])?"
    # Line ends, C0 and C1, and bidirectional controls: these would make a command read differently
    # from its bytes.
    r"|\r\n?|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)


class ControlFilter:
    r"""Drops control sequences from a stream, however the stream is cut into pieces.

    `\r\n` and a lone `\r`, which would overwrite what was read already, both become `\n`. Of the
    C0 controls only tab and newline remain.
    """

    def __init__(self) -> None:
        self._held = ""  # a sequence that has not ended
        self._after_return = False

    def feed(self, text: str) -> str:
        """Return the part of `text` that is safe to print."""
        if not text:
            return ""
        if self._after_return:
            text = text.removeprefix("\n")
        text, self._held = self._held + text, ""
        shown = _SEQUENCE.sub(self._replace, text)
        self._after_return = not self._held and text.endswith("\r")
        return shown

    def finish(self) -> None:
        """End the stream: an unfinished sequence is dropped."""
        self._held, self._after_return = "", False

    def _replace(self, match: re.Match[str]) -> str:
        if match[0][0] == "\r":
            return "\n"
        introduces = match[0][0] in "\x1b\x90\x98\x9b\x9d\x9e\x9f"
        if introduces and match.lastgroup is None and match.end() == len(match.string):
            self._held = match[0]
        return ""


def plain(text: str) -> str:
    """Return the text without terminal control."""
    return ControlFilter().feed(text)


def one_line(text: str) -> str:
    """Return the beginning of the text on one line, without terminal control."""
    line = " ".join(plain(text).split())
    return line if len(line) <= _LINE_LENGTH else f"{line[:_LINE_LENGTH]}…"
