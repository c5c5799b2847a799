"""Render Markdown while it streams: words appear as they come, and nothing printed is changed.

Other renderers need whole blocks: at 8 tokens per second, a paragraph that appears when it is
complete leaves ten seconds with nothing to read. The output is text, newlines and colour codes
(SGR), so it can be scrolled, copied and piped. The start of a line is held back until its kind is
clear, and a table until it ends.
"""

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dots1_local.cli.repl.markdown_blocks import Nesting, render_table
from dots1_local.cli.repl.markdown_inline import BOLD, CODE, DIM, Inline, Wrapper

__all__ = ["MarkdownStream"]

_NARROWEST = 20
_DEEPEST_QUOTE = 4  # deeper quotes are shown at this depth
_TAB = 4
_HEADING, _TITLE = f"{BOLD};35", f"{BOLD};4;35"

# The start of a line that may still become something else. Longer rows of dashes are text.
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
    """An open code block: its closing marker, its column, and the quotes around it."""

    marker: str
    column: int
    depth: int


class MarkdownStream:
    """Renders Markdown at most `width` terminal cells wide, and only appends through `write`.

    The only control characters in the text must be tab and newline. The output does not depend on
    how the text is cut into pieces.
    """

    def __init__(self, width: int, write: Callable[[str], None]) -> None:
        width = max(width, _NARROWEST)
        self._write = write
        self._queue: deque[str] = deque()
        self._out: list[str] = []
        self._sent = False
        self._wrapper = Wrapper(width, self._out.append)
        self._nesting = Nesting(width)
        self._head = ""  # the start of the line, while its kind is open
        self._base = 0  # the column where `_head` starts
        self._inline: Inline | None = None  # the open paragraph, item or heading
        self._in_text = False  # whether the rest of the line belongs to it
        self._is_heading = False
        self._depth = 0  # quotes around the line
        self._quote_indent = 0  # the column of the first quote
        self._fence: _Fence | None = None
        self._code_gap = 0  # blank lines in code, which are shown when more code follows
        self._rows: list[str] = []  # of a table, or a line that may begin one
        self._row_place = 0, 0  # the quotes and the column of the rows
        self._is_table = False

    def feed(self, text: str) -> None:
        """Render more of the text, as far as its meaning is clear."""
        self._queue.extend(text)
        while self._queue:
            self._next(self._queue.popleft())
        self._send()

    def finish(self) -> None:
        """Render all that is held back, and end with one newline and no colour."""
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
        """Start a block once the start of the line tells the kind of the line."""
        rest = self._head.lstrip(" \t")
        if _UNDECIDED.fullmatch(rest):
            return
        indent = len(self._head[: len(self._head) - len(rest)].expandtabs(_TAB)) + self._base
        if rest == "\n":
            self._end_table()
            self._end_block()
            self._nesting.add_blank(self._depth)
            self._end_line()
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
        """Continue the line after a marker, where a block of any kind may follow."""
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
        """Return whether a list may start here: within a paragraph, "2024. " is text."""
        starts = marker in {"-", "*", "+", "1.", "1)"}
        return starts or self._inline is None or self._nesting.in_list

    def _text(self, text: str) -> None:
        """Add to the open paragraph, item or heading."""
        self._in_text = True
        if self._inline is not None:
            self._inline.feed(text)
        if text.endswith("\n"):
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
        """End the block before, and begin one at column `indent`."""
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
        """Hold a line that begins with |; a second line decides whether they are a table."""
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
        """Render the table that is held back, or the line that did not begin a table."""
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
