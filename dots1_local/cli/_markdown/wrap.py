"""Wraps styled text to the width of a terminal as it streams, in any script."""

import re
from collections.abc import Callable

from rich.cells import cell_len

__all__ = ["Wrapper", "visible_width"]

_SGR = re.compile(r"\x1b\[[0-9;]*m")
_NOT_AT_START = frozenset("，。、；：？！）】》」』〉”’…·～,.;:?!)]}%")
_NOT_AT_END = frozenset("（【《「『〈“‘([{$")
_JOINER = "\u200d"
_SKIN_TONES = ("\U0001f3fb", "\U0001f3ff")


def visible_width(text: str) -> int:
    """The terminal cells that `text` takes, colour codes aside."""
    return cell_len(_SGR.sub("", text))


class Wrapper:
    """Wraps styled text to `width` terminal cells, a word at a time, and never goes back.

    A newline stays one: models break lines where they mean it, as in verse. A word wider than a
    line is left for the terminal to break, unless `chop`. Between wide characters a line may end
    anywhere, save next to punctuation that belongs to its neighbour.
    """

    def __init__(self, width: int, write: Callable[[str], None], *, chop: bool = False) -> None:
        self._width = width
        self._write = write
        self._chop = chop
        self.begin("", "")

    def begin(self, first: str, rest: str, above: str = "") -> None:
        """Start a block whose lines begin with `first`, from the second on with `rest`.

        `above` is written before all of it, unless the block turns out to be empty.
        """
        self._above, self._prefix, self._rest = above, first, rest
        self._begun = False  # whether the line has anything on it
        self._used = 0  # cells of it
        self._active = ""
        self._word: list[tuple[str, str]] = []
        self._last = ""
        self._is_endless = False  # the word is wider than a line, and written as it comes
        self._gap = ""  # spaces and newlines since the last word
        self._gap_style = ""

    def put(self, text: str, style: str) -> None:
        """More of the block."""
        for character in text:
            if character in " \t\n":
                self._commit()
                self._is_endless = False
                self._gap += character
                self._gap_style = style
            else:
                if (self._word or self._is_endless) and self._may_break(self._last, character):
                    self._commit()
                    self._is_endless = False
                self._last = character
                self._word.append((character, style))
                if self._is_endless or len(self._word) > self._width:
                    self._commit()
                    self._is_endless = True

    def end(self) -> None:
        """Complete the block and its last line."""
        self._commit()
        if self._begun:
            self._new_line()
        elif _SGR.sub("", self._prefix).strip(" │"):
            self._write(f"{self._above}{self._prefix.rstrip()}\n")

    def _may_break(self, before: str, after: str) -> bool:
        size = cell_len(after)
        if not size or before == _JOINER or _SKIN_TONES[0] <= after <= _SKIN_TONES[1]:
            return False
        if size < 2 and cell_len(before) < 2:
            return False
        if after not in _NOT_AT_START and before not in _NOT_AT_END:
            return True
        # A row of such punctuation is broken where the line ends; a long address keeps its own.
        room = self._width - visible_width(self._rest)
        return 0 <= room - cell_len("".join(c for c, _ in self._word)) < size

    def _commit(self) -> None:
        """Write the word held, on this line or the next."""
        if not self._word:
            return
        word, self._word = self._word, []
        text = "".join(character for character, _ in word)
        space = self._space()
        size = cell_len(text)
        too_wide = self._used + len(space) + size > self._width
        if self._begun and too_wide and not self._is_endless:
            self._new_line()
        if not self._begun:
            self._begin_line()
        elif space:
            self._paint(space, self._gap_style)
            self._used += 1
        for character, style in word:
            if self._chop and self._used + cell_len(character) > self._width:
                self._new_line()
                self._begin_line()
            self._paint(character, style)
            self._used += cell_len(character) if self._chop else 0
        self._used += 0 if self._chop else size
        self._gap = ""

    def _space(self) -> str:
        """What stands for the gap before a word: a space, a new line, or nothing."""
        if not self._gap or not self._begun:
            return ""
        if "\n" in self._gap:
            self._new_line()
            return ""
        return " "

    def _begin_line(self) -> None:
        self._write(self._above + self._prefix)
        self._above = ""
        self._used = visible_width(self._prefix)
        self._prefix = self._rest
        self._begun = True

    def _new_line(self) -> None:
        self._paint("", "")
        self._write("\n")
        self._begun = False

    def _paint(self, text: str, style: str) -> None:
        if style != self._active:
            self._write(("\x1b[0m" if self._active else "") + (f"\x1b[{style}m" if style else ""))
            self._active = style
        self._write(text)
