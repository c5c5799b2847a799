"""One choice during generation: its prompt, its tokens, its text with logprobs, its end."""

import time
from collections.abc import Iterator, Sequence
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.chat.draft import Drafter, DraftPolicy
from dots1_local.chat.kv_cache import common_prefix
from dots1_local.chat.sampler import Sampler
from dots1_local.engine.engine import Engine, Entry
from dots1_local.serve.cache_slot import CacheSlot
from dots1_local.serve.generation import (
    Event,
    Finished,
    Piece,
    Progress,
    QueuedChoice,
    Scored,
)
from dots1_local.serve.pieces import PieceBuilder, check_finite, token_logprob
from dots1_local.serve.slots import Slots

__all__ = ["Choice"]

_MIN_SHARED = 32  # tokens; computing fewer takes less time than waiting for another choice


class Choice:
    """A generation with a slot: it computes its prompt, then writes a token in every ubatch.

    The slot holds a prefix of the choice's tokens; between a step and its samples, it also holds a
    draft. `close` the choice at the end.
    """

    def __init__(
        self, queued: QueuedChoice, slot: CacheSlot, engine: Engine, policy: DraftPolicy
    ) -> None:
        self.handle, self._index, self._request = queued.handle, queued.index, queued.request
        self.prompt = self._request.prompt
        self.slot, self._engine = slot, engine
        self._tokens = list(self.prompt)  # generated tokens are appended
        room, wanted = engine.n_ctx - len(self.prompt), self._request.max_tokens
        self._limit = len(self.prompt) + (room if wanted is None else min(wanted, room))
        self._pieces = PieceBuilder(self._index, self._request.stop)
        self._computed = 0  # prompt tokens
        self._reported = -1  # how many were computed when the progress was last asked for
        self._prefix_source: Self | None = None
        self._shared = 0  # tokens that both prompts begin with, and the source computes
        self.started = time.monotonic()
        self._prompt_start = self._prompt_end = self.started
        self.done = False
        self._sampler = Sampler(self._request.sampling, engine, self._request.grammar)
        self._sampler.begin(self.prompt)
        self._drafter = Drafter(policy)

    def close(self) -> None:
        """Free the sampler, even if the choice has not ended."""
        self.done = True
        self._drafter.end()
        self._sampler.close()

    @property
    def scored(self) -> int | None:
        """How many likeliest tokens the logprobs of the prompt are to have; None: no logprobs."""
        return self._request.prompt_logprobs

    @property
    def n_generated(self) -> int:
        """How many tokens have been generated."""
        return len(self._tokens) - len(self.prompt)

    @property
    def prefilling(self) -> bool:
        """Whether prompt tokens are left to compute."""
        return not self.done and (
            self.slot.restoring > 0 or len(self.slot.tokens) < len(self.prompt)
        )

    def ready(self, slots: Slots, older: Sequence[Self]) -> bool:
        """Return whether the choice need not wait for a prefix; copy the prefix once it exists."""
        if self.slot.restoring:
            return False
        source = self._prefix_source
        if source is None:
            return True
        if source.prefilling and len(source.slot.tokens) < self._shared:
            return False
        slots.fill(self.slot, self.prompt, self.scored)
        self.wait_for_prefix(older)
        return self._prefix_source is None

    def wait_for_prefix(self, older: Sequence[Self]) -> None:
        """Wait for the one of the `older` choices with which this one shares the longest prefix.

        Waiting costs no time, because older prompts are computed first anyway, and two choices
        never wait for each other. If the other choice is cancelled, this one copies what has been
        computed and computes the rest itself.
        """
        known, self._prefix_source = self.prompt[:-1], None
        if not self._request.cache_prompt:
            return
        self._shared = max(self.slot.restoring, len(self.slot.tokens)) + _MIN_SHARED - 1
        for choice in older:
            if not (choice.prefilling and choice._scores_for(self.scored)):
                continue
            common = common_prefix(choice.prompt, known)
            if common > self._shared:
                self._prefix_source, self._shared = choice, common

    def _scores_for(self, top: int | None) -> bool:
        """Whether the prompt is computed with logprobs that have `top` likeliest tokens."""
        return top is None or (self.scored is not None and self.scored >= top)

    def prompt_entries(self, limit: int, outputs: int) -> list[Entry]:
        """Return up to `limit` further tokens of the prompt, `outputs` of them with logits."""
        start = len(self.slot.tokens)
        last = len(self.prompt) - 1
        if not self._computed:
            self._prompt_start = time.monotonic()
        if self.scored is not None:
            limit = min(limit, outputs)
        return [
            Entry(
                token,
                position,
                self.slot.seq_id,
                logits=position == last or self.scored is not None,
            )
            for position, token in enumerate(self.prompt[start : start + limit], start)
        ]

    def next_entries(self, *, alone: bool) -> list[Entry]:
        """Return the last token to compute, and if the choice is `alone` perhaps a draft."""
        start, draft = len(self._tokens) - 1, []
        if alone:
            if not self._drafter.begun:
                self._drafter.begin(self._tokens)
            draft = self._drafter.propose(self._limit - len(self._tokens) - 1)
        return [
            Entry(token, position, self.slot.seq_id, logits=True)
            for position, token in enumerate([self._tokens[-1], *draft], start)
        ]

    def computed(self, entries: Sequence[Entry], seconds: float) -> None:
        """Record that the engine has computed these entries, in a step of so many seconds."""
        if self.prefilling:
            self._computed += len(entries)
            self._prompt_end = time.monotonic()
        self._drafter.computed(seconds)
        self.slot.tokens += [entry.token for entry in entries]

    def progress(self) -> Progress | None:
        """Return how far the prompt is, if the request asks and there is something new."""
        if not self._request.progress or self._computed == self._reported:
            return None
        self._reported = self._computed
        return Progress(
            self._index,
            prompt_tokens=len(self.prompt),
            cached_tokens=len(self.slot.tokens) - self._computed,
            processed_tokens=len(self.slot.tokens),
            seconds=time.monotonic() - self._prompt_start,
        )

    def sample(self, rows: NDArray[np.float32], place: int) -> Iterator[Event]:
        """Sample from logits (tokens, n_vocab) for as long as the draft is right.

        The logits are from `place` on in the last ubatch: those that score the prompt's next
        tokens, those after the last token, and those after each token of the draft.

        Raises:
            Dots1Error: the logits are not finite.
        """
        scoring = min(len(rows), len(self.prompt) - 1 - len(self.slot.scores))
        if self.scored is not None and len(self._tokens) == len(self.prompt):
            self._score(rows[:scoring])
            if self.prefilling:
                return
            rows, place = rows[scoring:], place + scoring
            scores = self.slot.scores[: len(self.prompt) - 1]
            yield Scored(self._index, self._name(self.prompt[0]), tuple(scores))
        if self._limit == len(self.prompt):
            yield from self._end("length")
            return
        for row, logits in enumerate(rows):
            yield from self._sample(logits, place + row)
            if self.done or not self._drafter.accept(self._tokens[-1]):
                break
        valid = len(self._tokens) - 1  # the last token is not computed yet
        if len(self.slot.tokens) > valid:
            self.slot.cut(valid)
            self._engine.forget(valid, self.slot.seq_id)

    def _score(self, rows: NDArray[np.float32]) -> None:
        """Add the logprobs of the prompt's next tokens, from the logits before each."""
        assert self.scored is not None
        start = 1 + len(self.slot.scores)
        for logits, token in zip(rows, self.prompt[start:], strict=False):
            check_finite(logits)
            self.slot.scores.append(token_logprob(logits, token, self.scored, self._name))

    def _name(self, token: int) -> bytes:
        """The bytes of a token in a prompt; BOS is not of the text."""
        return b"" if token == self._engine.bos else self._engine.piece(token, special=True)

    def _sample(self, logits: NDArray[np.float32], place: int) -> Iterator[Event]:
        check_finite(logits)
        token = self._sampler.next(self._engine, place)
        self._tokens.append(token)
        top = self._request.top_logprobs
        logprob = None if top is None else token_logprob(logits, token, top, self._engine.piece)
        if self._engine.is_end(token) or token in self._request.stop_tokens:
            if logprob and self.scored is not None:
                yield Piece(self._index, "", (logprob,))
            yield from self._end("stop")
            return
        if piece := self._pieces.add(token, self._engine.piece(token), logprob):
            yield piece
        if self._pieces.stopped or len(self._tokens) == self._limit:
            yield from self._end("length")

    def _end(self, reason: Literal["stop", "length"]) -> Iterator[Event]:
        self.done = True
        if piece := self._pieces.finish():
            yield piece
        yield Finished(
            self._index,
            "stop" if self._pieces.stopped else reason,
            stop=self._pieces.stopped,
            prompt_tokens=len(self.prompt),
            cached_tokens=len(self.prompt) - self._computed,
            # OpenAI and others count the end token too, although it is not text.
            completion_tokens=self.n_generated,
            prompt_seconds=self._prompt_end - self._prompt_start,
            answer_seconds=time.monotonic() - self._prompt_end,
            drafted_tokens=self._drafter.drafted,
            accepted_tokens=self._drafter.accepted,
        )
