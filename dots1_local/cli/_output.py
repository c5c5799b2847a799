"""What the verbs share: data to stdout, everything else to stderr, colour only on a terminal.

Tables on stdout: ruled on a terminal, plain aligned columns in a pipe or a file.
"""

import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from shutil import get_terminal_size
from typing import Annotated, Any

import typer

from dots1_local.architecture import ROLES
from dots1_local.progress import Progress
from dots1_local.sizes import human_bytes

__all__ = [
    "Json",
    "Threads",
    "human_bytes",
    "notice",
    "notice_resumed",
    "print_json",
    "print_table",
    "progress_bar",
    "size_table",
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


_PIPE_WIDTH = 10_000  # off a terminal nothing is wrapped or cut: a script wants whole cells


def size_table(entries: Iterable[tuple[str, str, int, int]]) -> None:
    """Sum tensors given as (role, type, parameters, bytes): a row per role and type, and a total.

    Rows come in the order of `ROLES`, then of first appearance; share is of the bytes.
    """
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for role, kind, parameters, nbytes in entries:
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


def print_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers_from: int,
    total: Sequence[str] | None = None,
) -> None:
    """Print `rows` with the columns from `numbers_from` on aligned to the right."""
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


def _size_row(role: str, kind: str, counts: Sequence[int], all_bytes: int) -> tuple[str, ...]:
    tensors, parameters, nbytes = counts
    bpw = f"{8 * nbytes / parameters:.3f}" if parameters else "-"
    share = f"{nbytes / all_bytes:.1%}" if all_bytes else "-"
    return role, kind, f"{tensors:,}", f"{parameters:,}", human_bytes(nbytes), bpw, share
