"""The contract between HTTP and the engine's thread: orders go in, events come out.

A request that the scheduler has taken: who is told of it, and whether they still listen.

Log-probabilities of a token and of its likeliest alternatives.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from threading import RLock
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dots1_local.chat.grammar import Grammar
from dots1_local.chat.sampling import Sampling
from dots1_local.errors import Dots1Error

__all__ = [
    "Event",
    "Failed",
    "Finished",
    "Order",
    "Piece",
    "QueueFull",
    "Ticket",
    "TokenLogprob",
    "token_logprob",
]


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


_log = logging.getLogger(__name__)


class Ticket:
    """What `Scheduler.submit` returns; `over` once nothing more will be delivered."""

    def __init__(self, deliver: Callable[[Event], None]) -> None:
        self._deliver = deliver
        self._delivering = RLock()
        self.over = False

    def cancel(self) -> None:
        """Give the request up, from any thread; nothing is delivered after this returns.

        Its sequences become free before the next ubatch.
        """
        with self._delivering:
            self.over = True

    def tell(self, event: Event) -> None:
        """Deliver an event, if anybody listens; a listener that raises gets no further ones."""
        with self._delivering:
            if self.over:
                return
            self.over = isinstance(event, Failed)
            try:
                self._deliver(event)
            except Exception:
                _log.exception("an event could not be delivered")
                self.over = True


def token_logprob(
    logits: NDArray[np.float32], token: int, top: int, piece: Callable[[int], bytes]
) -> TokenLogprob:
    """The log-softmax of a row (n_vocab,) at `token` and at its `top` likeliest, best first."""
    maximum = logits.max()
    # Float32 is enough for each term; a float32 sum of 152,064 of them would not be.
    total = np.log(np.exp(logits - maximum).sum(dtype=np.float64))

    def at(which: int) -> float:
        return min(0.0, float(np.float64(logits[which]) - maximum - total))

    best = [(each, piece(each), at(each)) for each in _likeliest(logits, top)]
    return TokenLogprob(token, piece(token), at(token), tuple(best))


def _likeliest(logits: NDArray[np.float32], count: int) -> list[int]:
    count = min(count, len(logits))
    if not count:
        return []
    chosen = np.argpartition(logits, len(logits) - count)[len(logits) - count :]
    # Of equals the lower id first, as llama.cpp takes it.
    order = np.lexsort((chosen, -logits[chosen]))
    found: list[int] = chosen[order].tolist()
    return found
