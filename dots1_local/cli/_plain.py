"""Takes terminal control sequences out of a stream: what a model writes must not steer a terminal.

Sequences are those of ECMA-48, in their 7-bit (ESC) and 8-bit (C1) forms.

Text from anyone's file, made fit to be shown in a notice.
"""

import re
from enum import Enum, auto

__all__ = [
    "ControlFilter",
    "one_line",
    "plain",
]


# A payload without an end must not swallow an answer; what is shown of a longer one is harmless.
_LONGEST_SEQUENCE = 1024

# Embedding, override and isolate controls make a shown command read differently from its bytes.
_BIDI = "\u202a-\u202e\u2066-\u2069"
_SUSPECT = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{_BIDI}]")
_CANCEL = "\x18\x1a"
_ENDS_STRING = "\x07\x9c" + _CANCEL


class _State(Enum):
    TEXT = auto()
    RETURN = auto()  # text, after a carriage return
    ESCAPE = auto()
    CSI = auto()
    STRING = auto()  # the payload of OSC, DCS, APC, PM or SOS


_INTRODUCERS = {
    "\x1b": _State.ESCAPE,
    "\x9b": _State.CSI,
    **dict.fromkeys("\x90\x98\x9d\x9e\x9f", _State.STRING),
}
_AFTER_ESCAPE = {"[": _State.CSI, **dict.fromkeys("]PX^_", _State.STRING)}


class ControlFilter:
    """Lets text through and drops control sequences, however the stream is cut into pieces.

    A carriage return is a line end: `\\r\\n` and a lone `\\r`, which would overwrite what was
    read already, both become `\\n`. Of C0 only tab and newline are left.
    """

    def __init__(self) -> None:
        self._state = _State.TEXT
        self._length = 0  # characters of the sequence so far

    def feed(self, text: str) -> str:
        """What of `text` is safe to print; what belongs to a sequence is dropped."""
        if self._state is _State.TEXT and not _SUSPECT.search(text):
            return text
        return "".join(map(self._next, text))

    def finish(self) -> str:
        """End the stream; an unfinished sequence is dropped, so there is never anything left."""
        self._state = _State.TEXT
        return ""

    def _next(self, character: str) -> str:
        if self._state in {_State.TEXT, _State.RETURN}:
            return self._text(character)
        self._length += 1
        if character in _INTRODUCERS:
            # A new sequence ends the old one. The ESC of a final ESC \ is seen here as well.
            self._begin(_INTRODUCERS[character])
            return ""
        if self._length > _LONGEST_SEQUENCE:
            return self._text(character)
        return self._in_sequence(character)

    def _text(self, character: str) -> str:
        after_return = self._state is _State.RETURN
        self._state = _State.RETURN if character == "\r" else _State.TEXT
        if character in _INTRODUCERS:
            self._begin(_INTRODUCERS[character])
            return ""
        if character == "\r":
            return "\n"
        if character == "\n" and after_return:
            return ""
        return "" if _SUSPECT.match(character) else character

    def _begin(self, state: _State) -> None:
        self._state = state
        self._length = 0

    def _in_sequence(self, character: str) -> str:
        if self._state is _State.STRING:
            if character in _ENDS_STRING:
                self._state = _State.TEXT
            return ""
        if self._state is _State.ESCAPE and self._length == 1 and character in _AFTER_ESCAPE:
            self._begin(_AFTER_ESCAPE[character])
            return ""
        if " " <= character <= "/" or (self._state is _State.CSI and "0" <= character <= "?"):
            return ""  # intermediates and parameters
        if "0" <= character <= "~":
            self._state = _State.TEXT  # the final character
            return ""
        return self._text(character)  # no character of a sequence: it was cut off


_SHOWN_CHARACTERS = 60


def plain(text: str) -> str:
    """Without terminal control."""
    harmless = ControlFilter()
    return harmless.feed(text) + harmless.finish()


def one_line(text: str) -> str:
    """Its beginning, on one line and without terminal control."""
    line = " ".join(plain(text).split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}…"
