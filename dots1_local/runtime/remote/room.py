"""How much of a context a conversation takes, where only the server can count its tokens."""

from collections.abc import Sequence

from dots1_local.runtime.chat.message import Message
from dots1_local.runtime.chat.turns import count_turns, turns_to_drop

__all__ = ["Room"]

_AROUND = 8  # bytes that stand for what a chat template puts around each message


class Room:
    """An estimate by what the server counted last: so many tokens a byte."""

    def __init__(self) -> None:
        self._rate: float | None = None

    def learn(self, messages: Sequence[Message], tokens: int) -> None:
        """The server found so many tokens in these messages."""
        self._rate = tokens / _bytes(messages) if messages else None

    def to_drop(self, messages: Sequence[Message], n_ctx: int | None, limit: int | None) -> int:
        """How many of the oldest turns to drop for an answer of up to `limit` tokens.

        As in a `Session`, a quarter of the context is enough for any answer to begin with. None
        are to go where there is no estimate.
        """
        if self._rate is None or n_ctx is None:
            return 0
        quarter = n_ctx // 4
        most = n_ctx - max(1, min(limit or quarter, quarter))
        if self._size(messages) <= most:
            return 0
        return turns_to_drop(messages, self._size, most)

    def must_drop(self, messages: Sequence[Message], n_ctx: int | None, limit: int | None) -> int:
        """The same when the server has refused them all; half the turns where nothing is known."""
        estimated = self.to_drop(messages, n_ctx, limit)
        droppable = count_turns(messages) - 1
        return max(1, estimated if self._rate and n_ctx else (droppable + 1) // 2)

    def _size(self, messages: Sequence[Message]) -> int:
        return round((self._rate or 0) * _bytes(messages))


def _bytes(messages: Sequence[Message]) -> int:
    return sum(_AROUND + len(m.text.encode("utf-8", errors="replace")) for m in messages)
