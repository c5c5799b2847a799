"""One choice's text and logprobs, as they become certain."""

from collections import deque

from dots1_local.runtime.chat.stopping import AnswerText
from dots1_local.serve.generation import Piece, TokenLogprob

__all__ = ["Answer"]


class Answer:
    """Takes tokens and gives pieces.

    A token's logprobs go out with the first of its text, so they wait while that is held back.
    Tokens without text get theirs at the end. A token that begins at or after a stop string has
    none; one that a stop string begins inside has, as part of it is text.

    Raises:
        UsageError: a stop string is empty.
    """

    def __init__(self, index: int, stop: tuple[str, ...]) -> None:
        self._index = index
        self._text = AnswerText(stop)
        self._given = 0  # characters
        self._held: deque[tuple[int, TokenLogprob]] = deque()  # with where in the text it begins

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._text.stopped

    def add(self, token: int, piece: bytes, logprob: TokenLogprob | None) -> Piece | None:
        """What becomes certain with this token, if anything."""
        if logprob:
            self._held.append((self._text.length, logprob))
        text = self._text.add(token, piece)
        self._given += len(text)
        return self._piece(text, self._given)

    def finish(self) -> Piece | None:
        """What was held back, now that no more comes."""
        text = self._text.finish()
        self._given += len(text)
        return self._piece(text, self._given if self.stopped else self._text.length + 1)

    def _piece(self, text: str, end: int) -> Piece | None:
        logprobs = []
        while self._held and self._held[0][0] < end:
            logprobs.append(self._held.popleft()[1])
        return Piece(self._index, text, tuple(logprobs)) if text or logprobs else None
