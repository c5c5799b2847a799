"""The turns of a conversation: a user's message and what follows up to the next one."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dots1_local.progress import Progress
from dots1_local.runtime.chat.message import Message
from dots1_local.runtime.chat.stats import StopReason
from dots1_local.runtime.chat.stopping import AnswerText

__all__ = [
    "Answer",
    "EngineTurn",
    "Turn",
    "blame",
    "count_turns",
    "drop_oldest",
    "last_turn",
    "turns_to_drop",
]


class Answer(Protocol):
    """An answer's text as it comes."""

    def message(self) -> Message: ...


@dataclass
class Turn:
    """An answer that is being written, to the last of `messages`."""

    messages: list[Message]
    limit: int | None
    progress: Progress
    answer: Answer
    dropped: int = field(default=0, kw_only=True)

    def answered(self) -> Message | None:
        """The answer so far, if there is any text."""
        message = self.answer.message()
        return message if message.text else None


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
    """The index of the last user's message."""
    users = (index for index in reversed(range(len(messages))) if messages[index].role == "user")
    return next(users, None)


def count_turns(messages: Sequence[Message]) -> int:
    """How many messages users wrote."""
    return sum(message.role == "user" for message in messages)


def blame(messages: Sequence[Message]) -> tuple[str, str]:
    """What to call messages that the context does not hold, and what to do about them."""
    if count_turns(messages) > 1:
        return "with this question the conversation", "set overflow to drop"
    return "the prompt alone", "shorten it"


def drop_oldest(messages: Sequence[Message], count: int) -> list[Message]:
    """The messages without the `count` oldest turns; system messages stay."""
    kept, turn = [], 0
    for message in messages:
        turn += message.role == "user"
        if message.role == "system" or turn > count or count == 0:
            kept.append(message)
    return kept


def turns_to_drop(
    messages: Sequence[Message], size: Callable[[Sequence[Message]], int], limit: int
) -> int:
    """How many turns to drop from a conversation of more than `limit` tokens; the last one stays.

    What is left has to be computed again. So that this does not happen at every question, the older
    turns that stay take at most half of what the last one leaves.
    """

    def left(count: int) -> int:
        return size(drop_oldest(messages, count))

    droppable = count_turns(messages) - 1
    if droppable < 1:
        return 0
    target = limit - max(0, limit - left(droppable)) // 2
    counts = range(1, droppable)  # where none is enough, all of them
    return 1 + bisect_left(counts, True, key=lambda count: left(count) <= target)
