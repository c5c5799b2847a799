"""The contract between HTTP and the engine's thread: orders go in, events come out."""

from dataclasses import dataclass
from typing import Literal

from dots1_local.errors import Dots1Error
from dots1_local.runtime.chat.grammar import Grammar
from dots1_local.runtime.chat.sampling import Sampling

__all__ = ["Event", "Failed", "Finished", "Order", "Piece", "QueueFull", "TokenLogprob"]


@dataclass(frozen=True)
class Order:
    """One choice to be written: a continuation of `prompt`.

    `max_tokens` None means as many as the context holds. `top_logprobs` None asks for no logprobs;
    a number asks for each token's own and those of that many likeliest tokens.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    grammar: Grammar | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and `top`, the likeliest tokens in its place with theirs.

    All are natural logarithms, before temperature, penalties and grammar.
    """

    token: int
    piece: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text of the choice `index` that has become certain; "" where there are only logprobs."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """A choice's last event; `cached_tokens` of its prompt were in the KV cache already."""

    index: int
    reason: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failed:
    """A request's last event, for all its choices: the engine failed, or shuts down."""

    message: str


Event = Piece | Finished | Failed


class QueueFull(Dots1Error):
    """The queue is full; in about `retry_after` seconds there may be room."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(waiting, retry_after)  # all of it, so that it can be pickled
        self.waiting, self.retry_after = waiting, retry_after

    def __str__(self) -> str:
        return f"{self.waiting} answers are waiting already; try again in {self.retry_after} s"
