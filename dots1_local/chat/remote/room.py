"""How much of the context a conversation takes, where only the server can count tokens."""

from collections.abc import Sequence

from dots1_local.chat.message import Message
from dots1_local.chat.turns import count_turns, turns_to_drop

__all__ = ["Room"]

_AROUND = 8  # bytes for what a chat template puts around each message


class Room:
    """Estimates sizes by the tokens per byte of what the server counted last."""

    def __init__(self) -> None:
        self._rate: float | None = None

    def learn(self, messages: Sequence[Message], tokens: int) -> None:
        """Take note that the server counted so many tokens in these messages."""
        self._rate = tokens / _bytes(messages) if messages else None

    def to_drop(self, messages: Sequence[Message], n_ctx: int | None, limit: int | None) -> int:
        """How many of the oldest turns to drop for an answer of up to `limit` tokens.

        As in a `Session`, an answer gets at most a quarter of the context at first. Without an
        estimate no turns are dropped.
        """
        if self._rate is None or n_ctx is None:
            return 0
        quarter = n_ctx // 4
        most = n_ctx - max(1, min(limit or quarter, quarter))
        if self._size(messages) <= most:
            return 0
        return turns_to_drop(messages, self._size, most)

    def must_drop(self, messages: Sequence[Message], n_ctx: int | None, limit: int | None) -> int:
        """The same once the server has refused the messages; half the turns if unknown."""
        estimated = self.to_drop(messages, n_ctx, limit)
        droppable = count_turns(messages) - 1
        return max(1, estimated if self._rate and n_ctx else (droppable + 1) // 2)

    def _size(self, messages: Sequence[Message]) -> int:
        return round((self._rate or 0) * _bytes(messages))


def _bytes(messages: Sequence[Message]) -> int:
    return sum(_AROUND + len(m.text.encode("utf-8", errors="replace")) for m in messages)
