"""One choice's text and logprobs, as they become certain.

One choice while it is written: what of it is computed, what comes next, when it ends.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.chat.kv_cache import common_prefix
from dots1_local.chat.sampler import Sampler
from dots1_local.chat.turns import AnswerText
from dots1_local.engine.engine import Engine, Entry
from dots1_local.errors import Dots1Error
from dots1_local.serve.generation import Event, Finished, Piece, TokenLogprob, token_logprob
from dots1_local.serve.queue import Waiting
from dots1_local.serve.slots import Slot, Slots

__all__ = [
    "Answer",
    "Choice",
]


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


_WORTH_WAITING = 32  # tokens; to read fewer takes less time than to wait for them


class Choice:
    """An order with a slot: it reads its prompt, then writes one token in every ubatch.

    Its slot always holds a prefix of its tokens. `close` it at the end.
    """

    def __init__(self, waiting: Waiting, slot: Slot, engine: Engine) -> None:
        self.ticket, self._index, self._order = waiting.ticket, waiting.index, waiting.order
        self.prompt = waiting.order.prompt
        self.slot, self._engine = slot, engine
        self._tokens = list(self.prompt)  # what is written is added
        room = engine.n_ctx - len(self.prompt)
        self._limit = len(self.prompt) + min(self._order.max_tokens or room, room)
        self._answer = Answer(self._index, self._order.stop)
        self._computed = 0  # prompt tokens
        self._leader: Self | None = None
        self._awaited = 0  # tokens that both begin with, and the leader computes
        self.begun = time.monotonic()
        self.done = False
        self._sampler = Sampler(self._order.sampling, engine, self._order.grammar)
        self._sampler.begin(self.prompt)

    def close(self) -> None:
        """Free the sampler, whether or not the choice has come to its end."""
        self.done = True
        self._sampler.close()

    @property
    def reading(self) -> bool:
        """Whether prompt tokens are left to compute."""
        return not self.done and len(self.slot.tokens) < len(self.prompt)

    def ready(self, slots: Slots, older: Sequence[Self]) -> bool:
        """Whether it has nothing to wait for; what it waited for is then copied to its slot."""
        leader = self._leader
        if leader is None:
            return True
        if leader.reading and len(leader.slot.tokens) < self._awaited:
            return False
        slots.fill(self.slot, self.prompt)
        self.follow(older)
        return self._leader is None

    def follow(self, older: Sequence[Self]) -> None:
        """Wait for the one of the `older` choices with which this one shares the longest prefix.

        Waiting delays nothing, as older choices read first anyway, and no two wait for each other.
        Should the leader be cancelled, this one takes what it has read, and reads the rest itself.
        """
        known, self._leader = self.prompt[:-1], None
        self._awaited = len(self.slot.tokens) + _WORTH_WAITING - 1
        for choice in older:
            common = common_prefix(choice.prompt, known) if choice.reading else 0
            if common > self._awaited:
                self._leader, self._awaited = choice, common

    def entries(self, limit: int) -> list[Entry]:
        """The next tokens to compute: the one just written, or up to `limit` of the prompt."""
        start = len(self.slot.tokens)
        last = len(self._tokens) - 1
        return [
            Entry(token, position, self.slot.number, logits=position == last)
            for position, token in enumerate(self._tokens[start : start + limit], start)
        ]

    def computed(self, entries: Sequence[Entry]) -> None:
        """Take note that these entries have been computed."""
        if self.reading:
            self._computed += len(entries)
        self.slot.tokens += [entry.token for entry in entries]

    def choose(self, logits: NDArray[np.float32], place: int) -> Iterator[Event]:
        """Choose the next token from the last one's logits (n_vocab,), at `place` in the ubatch.

        Raises:
            Dots1Error: the logits are not finite.
        """
        if not np.isfinite(logits.max()):
            raise Dots1Error("the model computes logits that are no numbers; is its file damaged?")
        token = self._sampler.next(self._engine, place)
        self._tokens.append(token)
        if self._engine.is_end(token):
            yield from self._end("stop")
            return
        top = self._order.top_logprobs
        logprob = None if top is None else token_logprob(logits, token, top, self._engine.piece)
        if piece := self._answer.add(token, self._engine.piece(token), logprob):
            yield piece
        if self._answer.stopped or len(self._tokens) == self._limit:
            yield from self._end("length")

    def _end(self, reason: Literal["stop", "length"]) -> Iterator[Event]:
        self.done = True
        if piece := self._answer.finish():
            yield piece
        yield Finished(
            self._index,
            "stop" if self._answer.stopped else reason,
            prompt_tokens=len(self.prompt),
            cached_tokens=len(self.prompt) - self._computed,
            # OpenAI and others count the end token too, though it is no text.
            completion_tokens=len(self._tokens) - len(self.prompt),
        )
