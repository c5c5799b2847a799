"""Tables on stdout: ruled on a terminal, plain aligned columns in a pipe or a file."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from dots1_local.architecture import ROLES
from dots1_local.cli._output import human_bytes

__all__ = ["print_table", "size_table"]

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
