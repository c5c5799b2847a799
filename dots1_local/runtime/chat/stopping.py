"""An answer's text as its tokens come: whole characters, up to a stop string."""

import codecs
from collections.abc import Iterator

from dots1_local.errors import UsageError
from dots1_local.runtime.chat.message import Message

__all__ = ["AnswerText", "check_stop"]


def check_stop(stop: tuple[str, ...]) -> None:
    """Refuse stop strings that every answer has.

    Raises:
        UsageError: one of them is empty.
    """
    if not all(stop):
        raise UsageError("a stop string is empty; it would stop every answer at once")


class AnswerText:
    """Takes bytes and gives text; what may be the beginning of a stop string is held back.

    The text ends before the stop string that begins first, wherever tokens are cut.

    Raises:
        UsageError: a stop string is empty.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        check_stop(stop)
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._given: list[str] = []
        self.length = 0  # characters decoded so far, given out or not
        self._whole = {0: 0}  # how many tokens make exactly so many characters
        self.tokens: list[int] = []
        self.stopped = False

    def add(self, token: int, piece: bytes) -> str:
        """The text that is certain with this token; sets `stopped` after a stop string."""
        text = self._decoder.decode(piece)
        self.tokens.append(token)
        self.length += len(text)
        if not self._decoder.getstate()[0]:
            self._whole[self.length] = len(self.tokens)
        return self._give(self._held + text, ended=False)

    def finish(self) -> str:
        """What was held back, now that no more comes; half a character is not text."""
        return self._give(self._held, ended=True)

    def message(self) -> Message:
        """The text given out so far, with its tokens if it ends where one of them does."""
        text = "".join(self._given)
        count = self._whole.get(len(text))
        return Message("assistant", text, None if count is None else tuple(self.tokens[:count]))

    def _give(self, text: str, ended: bool) -> str:
        if self.stopped:
            return ""
        match = min((at for at in map(text.find, self._stop) if at >= 0), default=len(text))
        unsure = len(text) if ended else min(self._beginnings(text), default=len(text))
        self.stopped = match < len(text) and match <= unsure
        given, self._held = text[: min(match, unsure)], text[unsure:]
        self._given.append(given)
        return given

    def _beginnings(self, text: str) -> Iterator[int]:
        """Where the end of `text` could be the beginning of a stop string."""
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:size]):
                    yield len(text) - size
                    break
