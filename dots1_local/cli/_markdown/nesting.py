"""The quotes and list items around a block: what its lines begin with on the screen."""

from dataclasses import dataclass

from dots1_local.cli._markdown.inline import DIM
from dots1_local.cli._markdown.wrap import visible_width

__all__ = ["Nesting"]

_BAR = f"\x1b[{DIM}m│\x1b[0m "


@dataclass(frozen=True)
class _Item:
    """An open list item: its marker's column in the source, its text's on the screen."""

    column: int
    indent: int


class Nesting:
    """Where the current block is; indents stay within half of `width` terminal cells."""

    def __init__(self, width: int) -> None:
        self._width = width
        self.depth = 0  # quotes, as shown
        self._items: list[_Item] = []  # within the quotes
        self._outside: list[_Item] = []  # around them
        self._gap: int | None = None  # blank lines were seen, in so many quotes

    @property
    def margin(self) -> str:
        """What the lines of the block begin with."""
        return self._bars(self.depth) + " " * self._indent

    @property
    def blank_margin(self) -> str:
        """The same for an empty line."""
        return self._bars(self.depth).rstrip()

    @property
    def room(self) -> int:
        """The terminal cells left for the block."""
        return max(1, self._width - visible_width(self.margin))

    @property
    def in_list(self) -> bool:
        """Whether a list item is open."""
        return bool(self._items)

    def add_blank(self, depth: int) -> None:
        """A blank line, within `depth` quotes, before the block to come."""
        self._gap = depth if self._gap is None else min(self._gap, depth)

    def take_blank(self) -> str:
        """The line to print before the block: many blank lines are one, none is none."""
        gap, self._gap = self._gap, None
        return "" if gap is None else self._bars(min(gap, self.depth)).rstrip() + "\n"

    def enter_quotes(self, depth: int, indent: int) -> None:
        """The block to come is within `depth` quotes, the first of them at column `indent`."""
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
        """Close the items that a block at column `indent` is no part of.

        Two columns after the marker are enough to be a part: models rarely indent by more.
        """
        while self._items and indent < self._items[-1].column + 2:
            self._items.pop()

    def enter_item(self, marker: str, column: int) -> None:
        """Open an item whose `marker`, as shown, is at `column` of the source."""
        deepest = max(0, self._width // 2 - visible_width(self._bars(self.depth)))
        self._items.append(_Item(column, min(self._indent + len(marker) + 1, deepest)))

    @property
    def _indent(self) -> int:
        return self._items[-1].indent if self._items else 0

    def _bars(self, depth: int) -> str:
        outside = self._outside[-1].indent if depth and self._outside else 0
        return " " * outside + _BAR * depth
