"""What the verbs share: data to stdout, everything else to stderr, colour only on a terminal."""

import json
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from shutil import get_terminal_size
from typing import Annotated, Any

import typer

from dots1_local.progress import Progress
from dots1_local.sizes import human_bytes

__all__ = [
    "Json",
    "Threads",
    "human_bytes",
    "notice",
    "notice_resumed",
    "print_json",
    "progress_bar",
]

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, help="CPU threads; one a core if unset.")
]


def notice(message: str) -> None:
    """Say something to the person, on stderr; a terminal's width breaks no word."""
    if sys.stderr.isatty():
        width = get_terminal_size().columns
        message = "\n".join(_wrapped(line, width) for line in message.split("\n"))
    print(message, file=sys.stderr)


def notice_resumed(done: int, total: int, unit: str, what: str) -> None:
    """Say how much of the work a former run has done; a `Progress`."""
    notice(f"resuming: {done} of {total} {unit} are done")


def _wrapped(line: str, width: int) -> str:
    if len(line) < width:
        return line
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)


def print_json(value: Any) -> None:
    """The one way JSON leaves the program."""
    readable = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(value, indent=2, ensure_ascii=not readable))


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A bar on stderr with amount, rate and time left; nothing where stderr is no terminal."""
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

        def report(done: int, total: int, unit: str, what: str) -> None:
            amount = _amount(done, total, bar.tasks[task].speed or 0, unit)
            bar.update(task, completed=done, total=total, amount=amount, what=what)

        yield report


def _amount(done: int, total: int, speed: float, unit: str) -> str:
    if unit == "bytes":
        return f"{human_bytes(done)} of {human_bytes(total)}, {human_bytes(speed)}/s"
    return f"{done:,} of {total:,} {unit}, {speed:,.0f}/s"
