"""Renders Markdown while it streams: words appear as they come, and nothing printed is changed.

An own renderer because others want whole blocks: at 8 tokens a second, a paragraph that comes when
it is finished leaves ten seconds with nothing to read. The output is text, newlines and colour
codes (SGR), so it can be scrolled, copied and piped. A line's start is held back until its kind is
clear, a table until it ends.
"""

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dots1_local.cli._markdown.blocks import Nesting, render_table
from dots1_local.cli._markdown.inline import BOLD, CODE, DIM, Inline, Wrapper

__all__ = ["MarkdownStream"]

_NARROWEST = 20
_DEEPEST_QUOTE = 4  # quotes further in are shown at this depth
_TAB = 4
_HEADING, _TITLE = f"{BOLD};35", f"{BOLD};4;35"

# A line's start that may still become something else. Longer rows of dashes are text.
_UNDECIDED = re.compile(
    r"#{0,6}|(?=.{1,200}\Z)([-*_+])(?:[ \t]*+\1)*+[ \t]*|\d{1,9}[.)]?"
    r"|`{1,2}|~{1,2}|`{3,}[^`\n]*|~{3,}[^\n]*|\|[^\n]*"
)
_RULE = re.compile(r"([-*_])(?:[ \t]*\1){2,}[ \t]*\n")
_HEADING_START = re.compile(r"(#{1,6})(?:[ \t]+|(?=\n))")
_ITEM = re.compile(r"([-*+]|\d{1,9}[.)])(?:[ \t]*\n|[ \t]+)")
_FENCE = re.compile(r"(`{3,}|~{3,})[^\n]*\n")
_ROW = re.compile(r"\|[^\n]*\n")
_DELIMITER = re.compile(r"\|[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*\n")


@dataclass(frozen=True)
class _Fence:
    """An open code block: the marker that closes it, its column, and the quotes around it."""

    marker: str
    column: int
    depth: int


class MarkdownStream:
    """Renders Markdown at most `width` terminal cells wide through `write`, append-only.

    The text must hold no control characters but tab and newline. How it is cut into pieces makes
    no difference to the output.
    """

    def __init__(self, width: int, write: Callable[[str], None]) -> None:
        width = max(width, _NARROWEST)
        self._write = write
        self._queue: deque[str] = deque()
        self._out: list[str] = []
        self._sent = False
        self._wrapper = Wrapper(width, self._out.append)
        self._nesting = Nesting(width)
        self._head = ""  # of the line, as long as its kind is open
        self._base = 0  # the column where `_head` starts
        self._inline: Inline | None = None  # of the paragraph, item or heading that is open
        self._in_text = False  # the rest of the line belongs to it
        self._is_heading = False
        self._depth = 0  # quotes around the line
        self._quote_indent = 0  # the column of the first of them
        self._fence: _Fence | None = None
        self._code_gap = 0  # blank lines in code, shown when more code follows
        self._rows: list[str] = []  # of a table, or a line that may become one
        self._row_place = 0, 0  # their quotes and column
        self._is_table = False

    def feed(self, text: str) -> None:
        """Render more of the text, as far as it is clear what it means."""
        self._queue.extend(text)
        while self._queue:
            self._next(self._queue.popleft())
        self._send()

    def finish(self) -> None:
        """Render all that was held back; the output ends with one newline and no colour."""
        if self._head or self._in_text:
            self.feed("\n")
        self._end_table()
        self._end_block()
        self._fence = None
        self._send()

    def _send(self) -> None:
        if self._out:
            self._sent = True
            self._write("".join(self._out))
            self._out.clear()

    def _next(self, character: str) -> None:
        if self._in_text:
            self._text(character)
            return
        self._head += character
        if self._fence is None:
            self._begin_line()
        elif character == "\n":
            self._code_line(self._fence)

    def _end_line(self) -> None:
        self._in_text = False
        if self._is_heading:
            self._end_block()
        self._head, self._base, self._depth = "", 0, 0

    def _begin_line(self) -> None:
        """Act on the start of a line once it says what the line is."""
        rest = self._head.lstrip(" \t")
        if _UNDECIDED.fullmatch(rest):
            return
        indent = len(self._head[: len(self._head) - len(rest)].expandtabs(_TAB)) + self._base
        if rest == "\n":
            self._blank_line()
        elif rest.startswith(">"):
            self._quote_indent = self._quote_indent if self._depth else indent
            self._depth = min(self._depth + 1, _DEEPEST_QUOTE)
            self._again(rest[1:], -1)  # the space after it is not indentation
        elif _ROW.fullmatch(rest):
            self._row(rest, indent)
        else:
            self._end_table()
            self._enter_quotes(self._depth)
            self._block(rest, indent)

    def _again(self, rest: str, base: int) -> None:
        """Go on with the line after a marker: what follows may be a block of any kind."""
        self._head, self._base = "", base
        self._queue.extendleft(reversed(rest))

    def _block(self, rest: str, indent: int) -> None:
        if _RULE.match(rest):
            self._start(indent)
            rule = "─" * self._nesting.room
            self._out += [self._above(), f"{self._nesting.margin}\x1b[{DIM}m{rule}\x1b[0m\n"]
            self._end_line()
        elif match := _HEADING_START.match(rest):
            self._start(indent)
            self._is_heading = True
            self._open(self._nesting.margin, _TITLE if match[1] == "#" else _HEADING)
            self._text(rest[match.end() :])
        elif match := _FENCE.match(rest):
            self._start(indent)
            self._fence = _Fence(match[1], max(indent, 0), self._depth)
            self._end_line()
        elif (match := _ITEM.match(rest)) and self._may_list(match[1]):
            self._item(match, indent)
        else:
            if self._inline is None:
                self._start(indent)
                self._open(self._nesting.margin)
            self._text(rest)

    def _may_list(self, marker: str) -> bool:
        """Whether a list may start here: in a paragraph, "2024. " at a line's start is text."""
        starts = marker in {"-", "*", "+", "1.", "1)"}
        return starts or self._inline is None or self._nesting.in_list

    def _text(self, text: str) -> None:
        """More of a line that belongs to the open paragraph, item or heading."""
        self._in_text = True
        if self._inline is not None:
            self._inline.feed(text)
        if text.endswith("\n"):
            self._end_line()

    def _blank_line(self) -> None:
        self._end_table()
        self._end_block()
        self._nesting.add_blank(self._depth)
        self._end_line()

    def _item(self, match: re.Match[str], indent: int) -> None:
        self._start(indent)
        marker = match[1] if match[1][0].isdigit() else "•"
        first = f"{self._nesting.margin}{marker} "
        self._nesting.enter_item(marker, indent)
        self._open(first)
        if match[0].endswith("\n"):
            self._end_line()
        else:
            self._again(match.string[match.end() :], indent + len(match[0]))

    def _start(self, indent: int) -> None:
        """End the block before; a new one begins at column `indent`."""
        self._end_block()
        self._nesting.leave_items(indent)

    def _above(self) -> str:
        blank = self._nesting.take_blank()
        return blank if self._out or self._sent else ""

    def _open(self, first: str, style: str = "") -> None:
        self._wrapper.begin(first, self._nesting.margin, self._above())
        self._inline = Inline(self._wrapper.put, style)

    def _end_block(self) -> None:
        if self._inline is not None:
            self._inline.finish()
            self._wrapper.end()
        self._inline = None
        self._is_heading = False

    def _enter_quotes(self, depth: int) -> None:
        if depth != self._nesting.depth:
            self._end_block()
            self._nesting.enter_quotes(depth, self._quote_indent)

    def _code_line(self, fence: _Fence) -> None:
        line = self._head
        if fence.depth:
            quotes = re.match(rf"(?:[ \t]*>){{{fence.depth}}} ?", line)
            if not quotes:
                self._fence = None
                self._again(line, 0)
                return
            line = line[quotes.end() :]
        line = line.rstrip().expandtabs(_TAB)
        self._end_line()
        self._depth = 0
        text = line.lstrip()
        if text.startswith(fence.marker) and not text.strip(fence.marker[0]):
            self._fence, self._code_gap = None, 0
        elif not text:
            self._code_gap += 1
        else:
            shown = line[min(len(line) - len(text), fence.column) :]
            blank = self._nesting.blank_margin + "\n"
            self._out += [self._above(), blank * self._code_gap]
            self._out.append(f"{self._nesting.margin}\x1b[{CODE}m{shown}\x1b[0m\n")
            self._code_gap = 0

    def _row(self, line: str, indent: int) -> None:
        """A line that begins with |: the second of a table decides whether it is one."""
        is_second = len(self._rows) == 1 and not self._is_table
        same_quotes = self._row_place[0] == self._depth
        if is_second and same_quotes and _DELIMITER.fullmatch(line):
            self._is_table = True
            self._enter_quotes(self._depth)
            self._start(self._row_place[1])
        elif is_second or not same_quotes:
            self._end_table()
        self._rows.append(line)
        self._row_place = self._depth, indent
        self._end_line()

    def _end_table(self) -> None:
        """Show the table that was held back, or the line that did not become one."""
        rows, self._rows = self._rows, []
        if self._is_table:
            self._is_table = False
            margin = self._nesting.margin
            lines = render_table(rows, self._nesting.room)
            self._out += [self._above(), *(f"{margin}{line}\n" for line in lines)]
        elif rows:
            line = self._head, self._base, self._depth
            depth, indent = self._row_place
            self._enter_quotes(depth)
            self._block(rows[0], indent)
            self._head, self._base, self._depth = line
