"""Markdown within a paragraph, while it streams: emphasis, code spans, links."""

import re
from collections.abc import Callable
from string import punctuation

__all__ = ["BOLD", "CODE", "DIM", "Inline"]

# SGR parameters. Of the 16 colours, those that read on a dark and on a light background.
BOLD, DIM, ITALIC, UNDERLINE, STRIKE, CODE = "1", "2", "3", "4", "9", "36"

_LONGEST_HOLD = 200  # characters held back for the other end of a span

# What a span may hold: code and escaped characters are atoms, so that no marker in them counts.
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
    """Finds the spans of a paragraph as it comes, and hands on characters with their style.

    A marker is held back until its other end is there. Where that does not come within the
    paragraph or the next 200 characters, it is text.
    """

    def __init__(self, put: Callable[[str, str], None], style: str = "") -> None:
        self._put = put
        self._style = style
        self._held = ""
        self._word = ""  # what was handed on since the last space

    def feed(self, text: str) -> None:
        """More of the paragraph; newlines in it stay."""
        for character in text:
            self._held += character
            self._resolve(final=False)

    def finish(self) -> None:
        """The paragraph is complete: nothing is held any longer."""
        self._resolve(final=True)

    def _resolve(self, final: bool) -> None:
        while self._held and (taken := self._take(self._held, self._style, final)):
            self._held = self._held[taken:]

    def _take(self, text: str, style: str, final: bool) -> int:
        """Hand on what `text` begins with; how many characters that was, 0 to wait for more."""
        if text[0] not in "\\`*_~[!$":
            return self._emit(text[0], style)
        if not self._may_open(text):
            return self._literal(text, style)
        # A span counts when the character after it is there: it may belong to the closing marker.
        if (taken := self._span(text, style, len(text) - (not final))) or final:
            return taken or self._literal(text, style)
        return self._literal(text, style) if len(text) >= _LONGEST_HOLD else 0

    def _may_open(self, text: str) -> bool:
        """Whether `text` begins with a marker that opens a span, or may yet become one."""
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
        """Hand on the span that `text` begins with, if it ends by `limit`; its length or 0."""
        for find, show in (
            (_MATH, self._show_math),
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

    def _show_math(self, match: re.Match[str], style: str) -> None:
        self._emit(match[0], style)

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
            self._emit("\n", style)  # a line break, unless the paragraph ends with it
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
