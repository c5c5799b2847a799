"""Blocks of Markdown: the quotes and list items around a block, and tables."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from dots1_local.cli.repl.markdown_inline import BOLD, DIM, Inline, Wrapper, visible_width

__all__ = ["Nesting", "render_table"]

_BAR = f"\x1b[{DIM}m│\x1b[0m "
_COLUMN_BAR = f" {_BAR}"
_UNLIMITED = 10**6
_NARROWEST_COLUMN = 4
_SIDES = {(True, True): "center", (False, True): "right"}  # by colons at both ends
_CELL_END = re.compile(r"(?<!\\)\|")


@dataclass(frozen=True)
class _Item:
    """An open list item: the column of its marker in the source, and of its text on the screen."""

    column: int
    indent: int


class Nesting:
    """The quotes and items around the current block; indents stay within half of `width`."""

    def __init__(self, width: int) -> None:
        self._width = width
        self.depth = 0  # quotes, as shown
        self._items: list[_Item] = []  # within the quotes
        self._outside: list[_Item] = []  # around the quotes
        self._gap: int | None = None  # the quotes around the blank lines before the block

    @property
    def margin(self) -> str:
        """The beginning of each line of the block."""
        return self._bars(self.depth) + " " * self._indent

    @property
    def blank_margin(self) -> str:
        """The beginning of an empty line of the block."""
        return self._bars(self.depth).rstrip()

    @property
    def room(self) -> int:
        """The terminal cells that are left for the block."""
        return max(1, self._width - visible_width(self.margin))

    @property
    def in_list(self) -> bool:
        """Whether a list item is open."""
        return bool(self._items)

    def add_blank(self, depth: int) -> None:
        """Note a blank line, within `depth` quotes, before the next block."""
        self._gap = depth if self._gap is None else min(self._gap, depth)

    def take_blank(self) -> str:
        """Return the line to print before the block, which stands for all blank lines."""
        gap, self._gap = self._gap, None
        return "" if gap is None else self._bars(min(gap, self.depth)).rstrip() + "\n"

    def enter_quotes(self, depth: int, indent: int) -> None:
        """Put the next block within `depth` quotes, the first of which is at column `indent`."""
        if depth == self.depth:
            return
        if self.depth == 0:
            self.leave_items(indent)
            self._outside = self._items
        self._items = [] if depth else self._outside
        if self._gap is not None:
            self._gap = min(self._gap, self.depth)
        self.depth = depth

    def leave_items(self, indent: int) -> None:
        """Close the items that a block at column `indent` does not belong to.

        A block belongs to an item from two columns after its marker: models rarely indent by more.
        """
        while self._items and indent < self._items[-1].column + 2:
            self._items.pop()

    def enter_item(self, marker: str, column: int) -> None:
        """Open an item whose shown `marker` is at `column` of the source."""
        deepest = max(0, self._width // 2 - visible_width(self._bars(self.depth)))
        self._items.append(_Item(column, min(self._indent + len(marker) + 1, deepest)))

    @property
    def _indent(self) -> int:
        return self._items[-1].indent if self._items else 0

    def _bars(self, depth: int) -> str:
        outside = self._outside[-1].indent if depth and self._outside else 0
        return " " * outside + _BAR * depth


def render_table(lines: Sequence[str], width: int) -> list[str]:
    """Return the styled lines for the header, delimiter and body rows of a table.

    If the table is wider than `width` terminal cells, its cells are wrapped. If its columns do not
    fit at all, each row is a paragraph.
    """
    header, delimiter, *body = map(_split, lines)
    rows = [header, *body]
    count = max(map(len, rows))
    if count * (_NARROWEST_COLUMN + 3) - 3 > width:
        return [line for row in rows for line in _cell(" | ".join(row), width)]
    columns = zip_longest(*rows, fillvalue="")
    lengths = [[visible_width("".join(_cell(each, _UNLIMITED))) for each in c] for c in columns]
    widths = _fit(list(map(max, lengths)), width)
    marks = [(mark[:1] == ":", mark[-1:] == ":") for mark in delimiter]
    sides = [_SIDES.get(mark, "left") for mark in marks] + ["left"] * (count - len(marks))
    rule = "─┼─".join("─" * size for size in widths)
    printed = [f"\x1b[{DIM}m{rule}\x1b[0m"]
    for place, row in enumerate(rows):
        cells = row + [""] * (count - len(row))
        shown = _row(cells, widths, sides, BOLD if place == 0 else "")
        printed = shown + printed if place == 0 else printed + shown
    return printed


def _split(line: str) -> list[str]:
    cells = _CELL_END.split(line.strip().removeprefix("|"))
    if not cells[-1].strip():
        cells.pop()
    return [cell.strip().replace("\\|", "|") for cell in cells]


def _fit(widths: list[int], width: int) -> list[int]:
    """Narrow the widest columns until all columns and bars fit."""
    widths = [max(size, 1) for size in widths]
    while sum(widths) + 3 * (len(widths) - 1) > width:
        widths[widths.index(max(widths))] -= 1
    return widths


def _row(cells: list[str], widths: list[int], sides: list[str], style: str) -> list[str]:
    wrapped = [_cell(cell, size, style) for cell, size in zip(cells, widths, strict=True)]
    return [
        _COLUMN_BAR.join(map(_pad, line, widths, sides)).rstrip()
        for line in zip_longest(*wrapped, fillvalue="")
    ]


def _pad(text: str, width: int, side: str) -> str:
    space = width - visible_width(text)
    left = {"left": 0, "center": space // 2, "right": space}[side]
    return " " * left + text + " " * (space - left)


def _cell(text: str, width: int, style: str = "") -> list[str]:
    """Return the text of a table cell as lines of at most `width` terminal cells."""
    out: list[str] = []
    wrapper = Wrapper(width, out.append, chop=True)
    inline = Inline(wrapper.put, style)
    inline.feed(text)
    inline.finish()
    wrapper.end()
    return "".join(out).splitlines()
