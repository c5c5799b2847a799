"""A Markdown table as aligned columns that fit a terminal, wide characters counted as such."""

import re
from collections.abc import Sequence
from itertools import zip_longest

from dots1_local.cli._markdown.inline import BOLD, DIM, Inline
from dots1_local.cli._markdown.wrap import Wrapper, visible_width

__all__ = ["render_table"]

_BAR = f" \x1b[{DIM}m│\x1b[0m "
_UNLIMITED = 10**6
_NARROWEST_COLUMN = 4
_CELL_END = re.compile(r"(?<!\\)\|")


def render_table(lines: Sequence[str], width: int) -> list[str]:
    """The lines to print for the header, delimiter and body rows of a table, styled.

    Cells are wrapped where the table is wider than `width` cells. With more columns than fit at
    all, each row is a paragraph.
    """
    header, delimiter, *body = map(_split, lines)
    rows = [header, *body]
    count = max(map(len, rows))
    if count * (_NARROWEST_COLUMN + 3) - 3 > width:
        return [line for row in rows for line in _cell(" | ".join(row), width)]
    widths = _fit([_widest(column) for column in zip_longest(*rows, fillvalue="")], width)
    sides = [_side(mark) for mark in delimiter] + ["left"] * (count - len(delimiter))
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


def _side(mark: str) -> str:
    if mark.endswith(":"):
        return "center" if mark.startswith(":") else "right"
    return "left"


def _widest(column: Sequence[str]) -> int:
    return max(visible_width("".join(_cell(cell, _UNLIMITED))) for cell in column)


def _fit(widths: list[int], width: int) -> list[int]:
    """Take from the widest columns until they fit, bars included."""
    widths = [max(size, 1) for size in widths]
    while sum(widths) + 3 * (len(widths) - 1) > width:
        widths[widths.index(max(widths))] -= 1
    return widths


def _row(cells: list[str], widths: list[int], sides: list[str], style: str) -> list[str]:
    wrapped = [_cell(cell, size, style) for cell, size in zip(cells, widths, strict=True)]
    return [
        _BAR.join(map(_pad, line, widths, sides)).rstrip()
        for line in zip_longest(*wrapped, fillvalue="")
    ]


def _pad(text: str, width: int, side: str) -> str:
    space = width - visible_width(text)
    left = {"left": 0, "center": space // 2, "right": space}[side]
    return " " * left + text + " " * (space - left)


def _cell(text: str, width: int, style: str = "") -> list[str]:
    """A cell's text as lines of at most `width` terminal cells."""
    out: list[str] = []
    wrapper = Wrapper(width, out.append, chop=True)
    inline = Inline(wrapper.put, style)
    inline.feed(text)
    inline.finish()
    wrapper.end()
    return "".join(out).splitlines()
