"""Turns of a conversation (a user's message and what follows), and answers as they grow."""

import codecs
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dots1_local.chat.message import Message, StopReason
from dots1_local.errors import UsageError
from dots1_local.progress import Progress

__all__ = [
    "AnswerText", "EngineTurn", "Turn", "check_stop", "count_turns", "drop_oldest", "last_turn",
    "overflow_message", "turns_to_drop",
]  # fmt: skip


def check_stop(stop: tuple[str, ...]) -> None:
    """Raise a UsageError if a stop string is empty, because every answer contains it."""
    if not all(stop):
        raise UsageError("a stop string is empty, which would stop every answer; leave it out")


class AnswerText:
    """Turn tokens into text, in whole characters up to a stop string.

    Text that may be the beginning of a stop string is held back until it is certain. The answer
    ends before the stop string that begins first, which may begin or end inside a token.

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
        self.stopped: str | None = None  # the stop string that has ended the text

    def add(self, token: int, piece: bytes) -> str:
        """Return the text that is certain with this token; set `stopped` after a stop string."""
        text = self._decoder.decode(piece)
        self.tokens.append(token)
        self.length += len(text)
        if not self._decoder.getstate()[0]:
            self._whole[self.length] = len(self.tokens)
        return self._give(self._held + text, ended=False)

    def finish(self) -> str:
        """Return the text held back, when no token follows; half a character is dropped."""
        return self._give(self._held, ended=True)

    def message(self) -> Message:
        """Return the text so far, with its tokens if the text ends where one of them ends."""
        text = "".join(self._given)
        count = self._whole.get(len(text))
        return Message("assistant", text, None if count is None else tuple(self.tokens[:count]))

    def _give(self, text: str, ended: bool) -> str:
        if self.stopped:
            return ""
        found = ((at, stop) for stop in self._stop if (at := text.find(stop)) >= 0)
        match, stop = min(found, default=(len(text), None))
        unsure = len(text) if ended else min(self._beginnings(text), default=len(text))
        self.stopped = stop if match <= unsure else None
        given, self._held = text[: min(match, unsure)], text[unsure:]
        self._given.append(given)
        return given

    def _beginnings(self, text: str) -> Iterator[int]:
        """Yield places from which the end of `text` could be the beginning of a stop string."""
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:size]):
                    yield len(text) - size
                    break


class PartialAnswer(Protocol):
    """An answer that grows."""

    def message(self) -> Message: ...


@dataclass
class Turn:
    """An answer that is being written, to the last of `messages`.

    The oldest turns, `dropped` of them, are not in the context.
    """

    messages: list[Message]
    limit: int | None
    progress: Progress
    answer: PartialAnswer
    dropped: int

    @property
    def context(self) -> list[Message]:
        """The messages that the model sees."""
        return drop_oldest(self.messages, self.dropped)


@dataclass
class EngineTurn(Turn):
    """A turn that an engine computes from the tokens in `prompt`."""

    answer: AnswerText
    prompt: list[int] = field(default_factory=list)
    stop: StopReason = "interrupted"

    @property
    def size(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.answer.tokens)


def last_turn(messages: Sequence[Message]) -> int | None:
    """Return the index of the last user's message; None if there is none."""
    users = (index for index in reversed(range(len(messages))) if messages[index].role == "user")
    return next(users, None)


def count_turns(messages: Sequence[Message]) -> int:
    """Count the messages that users wrote."""
    return sum(message.role == "user" for message in messages)


def overflow_message(messages: Sequence[Message], size: int, n_ctx: int, remedy: str) -> str:
    """Say that the context does not hold `size` tokens, and what helps besides `remedy`."""
    what, first = "the prompt alone", "shorten it"
    if count_turns(messages) > 1:
        what, first = "with this question the conversation", "set overflow to drop"
    return f"{what} is {size:,} tokens long and the context holds {n_ctx:,}; {first}, or {remedy}"


def drop_oldest(messages: Sequence[Message], count: int) -> list[Message]:
    """Return the messages without the `count` oldest turns; system messages stay."""
    kept, turn = [], 0
    for message in messages:
        turn += message.role == "user"
        if message.role == "system" or turn > count or count == 0:
            kept.append(message)
    return kept


def turns_to_drop(
    messages: Sequence[Message], size: Callable[[Sequence[Message]], int], limit: int
) -> int:
    """Return how many turns to drop from a conversation of more than `limit` tokens.

    The last turn stays. What is left must be computed again. So that this does not happen at every
    question, the older turns that stay take at most half of the room that the last turn leaves.
    """

    def left(count: int) -> int:
        return size(drop_oldest(messages, count))

    droppable = count_turns(messages) - 1
    if droppable < 1:
        return 0
    target = limit - max(0, limit - left(droppable)) // 2
    counts = range(1, droppable)  # if none of these is enough, all turns are dropped
    return 1 + bisect_left(counts, True, key=lambda count: left(count) <= target)
