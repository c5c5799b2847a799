"""Text of Markdown as it streams: emphasis, code spans and links, wrapped in any script."""

import re
from collections.abc import Callable
from string import punctuation

from rich.cells import cell_len

__all__ = ["BOLD", "CODE", "DIM", "Inline", "Wrapper", "visible_width"]

# SGR parameters; the colours are readable on a dark and on a light background.
BOLD, DIM, ITALIC, UNDERLINE, STRIKE, CODE = "1", "2", "3", "4", "9", "36"

_LONGEST_HOLD = 200  # characters held back for the other end of a span

# The content of a span: a marker within code or after a backslash does not count.
_ATOM = r"`+[^`]+`+|\\."
_CONTENT = rf"((?>{_ATOM}|[^`\\])+?)(?<=\S)"
_EMPHASIS = [
    (re.compile(rf"\*\*\*(?=[^\s*]){_CONTENT}\*\*\*(?!\*)", re.DOTALL), f"{BOLD};{ITALIC}"),
    (re.compile(rf"\*\*(?=\S){_CONTENT}\*\*(?!\*)", re.DOTALL), BOLD),
    (
        re.compile(
            rf"\*(?=\S)((?>{_ATOM}|\*\*(?=\S)[^*]+\*\*|[^*`\\])+?)(?<=\S)\*(?!\*)",
            re.DOTALL,
        ),
        ITALIC,
    ),
    (re.compile(rf"_(?=[^\s_]){_CONTENT}_(?!\w)", re.DOTALL), ITALIC),
    (re.compile(rf"~~(?=[^\s~]){_CONTENT}~~(?!~)", re.DOTALL), STRIKE),
]
_CODE_SPAN = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_MATH = re.compile(
    r"\$\$[^$]+\$\$|\$(?![\s\d])[^$\n]*[^\s$]\$(?!\d)|\\\(.+?\\\)|\\\[.+?\\\]", re.DOTALL
)
_URL = r"[^\s()]*(?:\([^\s()]*\)[^\s()]*)*"
_LINK = re.compile(rf"!?\[([^\[\]]+)\]\(({_URL})(?:\s+\"[^\"]*\")?\)")

_NO_LINK = re.compile(r"!(?!\[).|!?\[[^\]]*\][^(]", re.DOTALL)
_IN_ADDRESS = re.compile(r"://[!-~]*\Z")
_BEFORE_UNDERSCORE = "([{\"'*~“‘（「『《【，。：；！？、—-"


class Inline:
    """Finds the spans of a paragraph while it streams, and passes on text with its style.

    An opening marker is held back until its closing marker comes. If that does not come within the
    paragraph or the next 200 characters, the opening marker is text.
    """

    def __init__(self, put: Callable[[str, str], None], style: str = "") -> None:
        self._put = put
        self._style = style
        self._held = ""
        self._word = ""  # what was passed on since the last space

    def feed(self, text: str) -> None:
        """Add to the paragraph; its newlines stay."""
        for character in text:
            self._held += character
            self._resolve(final=False)

    def finish(self) -> None:
        """End the paragraph, and pass on what is held back."""
        self._resolve(final=True)

    def _resolve(self, final: bool) -> None:
        while self._held and (taken := self._take(self._held, self._style, final)):
            self._held = self._held[taken:]

    def _take(self, text: str, style: str, final: bool) -> int:
        """Pass on the beginning of `text`; return its length, or 0 to wait for more."""
        if text[0] not in "\\`*_~[!$":
            return self._emit(text[0], style)
        if not self._may_open(text):
            return self._literal(text, style)
        # Wait for the character after a span, which may belong to the closing marker.
        if (taken := self._span(text, style, len(text) - (not final))) or final:
            return taken or self._literal(text, style)
        return self._literal(text, style) if len(text) >= _LONGEST_HOLD else 0

    def _may_open(self, text: str) -> bool:
        """Return whether `text` begins with a marker that may open a span."""
        marker = text[0]
        if marker in "\\`":
            return True
        if marker in "[!":
            return not _NO_LINK.match(text)
        run = len(text) - len(text.lstrip(marker))
        after = text[run : run + 1]
        if _IN_ADDRESS.search(self._word) or after.isspace() or run > 3:
            return False
        before = self._word[-1:]
        match marker:
            case "*":
                around = before + after
                return run > 1 or not (len(around) == 2 and around.isascii() and around.isalnum())
            case "_":
                return run == 1 and (not before or before in _BEFORE_UNDERSCORE)
            case "~":
                return run == 2 or not after
            case _:  # $
                return run == 2 or (not after.isdigit() and "\n" not in text[:-1])

    def _span(self, text: str, style: str, limit: int) -> int:
        """Pass on the span that begins `text` if it ends by `limit`; return its length or 0."""
        for find, show in (
            (_MATH, lambda match, style: self._emit(match[0], style)),
            (_CODE_SPAN, self._show_code),
            (_LINK, self._show_link),
        ):
            if (match := find.match(text)) and match.end() <= limit:
                show(match, style)
                self._word = self._word[-1:]
                return match.end()
        if text[0] == "\\" and len(text) > 1 and text[1] not in "([":
            return self._escape(text, style)
        for find, emphasis in _EMPHASIS:
            if (match := find.match(text)) and match.end() <= limit:
                self._parse(match[1], _join(style, emphasis))
                return match.end()
        return 0

    def _show_code(self, match: re.Match[str], style: str) -> None:
        content = match[2]
        if content[0] == content[-1] == " " and content.strip():
            content = content[1:-1]
        self._emit(content.replace("\n", " "), _join(style, CODE))

    def _show_link(self, match: re.Match[str], style: str) -> None:
        text, url = match.groups()
        self._parse(text, _join(style, UNDERLINE))
        if url and url != text:
            self._emit(" ", style)
            self._emit(f"({url})", _join(style, DIM))

    def _escape(self, text: str, style: str) -> int:
        if text[1] != "\n":
            self._emit(text[1] if text[1] in punctuation else text[:2], style)
        elif len(text) > 2:
            self._emit("\n", style)  # a line break, unless the paragraph ends here
        else:
            return 0
        return 2

    def _parse(self, text: str, style: str) -> None:
        while text:
            text = text[self._take(text, style, True) :]

    def _literal(self, text: str, style: str) -> int:
        run = len(text) - len(text.lstrip(text[0])) if text[0] in "`*_~$" else 1
        return self._emit(text[:run], style)

    def _emit(self, text: str, style: str) -> int:
        self._word = "" if text[-1].isspace() else self._word + text
        self._put(text, style)
        return len(text)


def _join(style: str, more: str) -> str:
    return f"{style};{more}" if style else more


_SGR = re.compile(r"\x1b\[[0-9;]*m")
_NOT_AT_START = frozenset("，。、；：？！）】》」』〉”’…·～,.;:?!)]}%")
_NOT_AT_END = frozenset("（【《「『〈“‘([{$")
_JOINER = "\u200d"
_SKIN_TONES = ("\U0001f3fb", "\U0001f3ff")


def visible_width(text: str) -> int:
    """Return the terminal cells that `text` takes without its colour codes."""
    return cell_len(_SGR.sub("", text))


class Wrapper:
    """Wraps styled text to `width` terminal cells, a word at a time, and changes nothing written.

    Newlines stay, because models break lines on purpose, as in verse. A word that is wider than a
    line is broken with `chop`, else by the terminal. A line may end between any two wide
    characters, except next to punctuation that belongs to its neighbour.
    """

    def __init__(self, width: int, write: Callable[[str], None], *, chop: bool = False) -> None:
        self._width = width
        self._write = write
        self._chop = chop
        self.begin("", "")

    def begin(self, first: str, rest: str, above: str = "") -> None:
        """Start a block whose first line begins with `first`, and the others with `rest`.

        `above` is written before the block unless the block is empty.
        """
        self._above, self._prefix, self._rest = above, first, rest
        self._begun = False  # whether anything is on the line
        self._used = 0  # terminal cells of the line
        self._active = ""
        self._word: list[tuple[str, str]] = []
        self._last = ""
        self._is_endless = False  # whether the word is wider than a line, and is written at once
        self._gap = ""  # spaces and newlines since the last word
        self._gap_style = ""

    def put(self, text: str, style: str) -> None:
        """Add to the block."""
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
        """End the block and its last line."""
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
        # Break a row of such punctuation at the line's end, but keep that of a long address.
        room = self._width - visible_width(self._rest)
        return 0 <= room - cell_len("".join(c for c, _ in self._word)) < size

    def _commit(self) -> None:
        """Write the word that is held back, on this line or the next."""
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
        """Return the space before a word, if any, or begin a new line."""
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
