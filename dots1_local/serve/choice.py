"""One choice during generation: its prompt, its tokens, its text with logprobs, its end."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from dots1_local.chat.draft import Drafter, DraftPolicy
from dots1_local.chat.kv_cache import common_prefix
from dots1_local.chat.sampler import Sampler
from dots1_local.chat.turns import AnswerText
from dots1_local.engine.engine import Engine, Entry
from dots1_local.errors import Dots1Error
from dots1_local.serve.cache_slot import CacheSlot
from dots1_local.serve.generation import (
    Event,
    Finished,
    Piece,
    QueuedChoice,
    Scored,
    TokenLogprob,
)
from dots1_local.serve.slots import Slots

__all__ = ["Choice", "PieceBuilder", "token_logprob"]

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
        self._prefix_source: Self | None = None
        self._shared = 0  # tokens that both prompts begin with, and the source computes
        self.started = time.monotonic()
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
        self._drafter.computed(seconds)
        self.slot.tokens += [entry.token for entry in entries]

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
            _check_finite(logits)
            self.slot.scores.append(token_logprob(logits, token, self.scored, self._name))

    def _name(self, token: int) -> bytes:
        """The bytes of a token in a prompt; BOS is not of the text."""
        return b"" if token == self._engine.bos else self._engine.piece(token, special=True)

    def _sample(self, logits: NDArray[np.float32], place: int) -> Iterator[Event]:
        _check_finite(logits)
        token = self._sampler.next(self._engine, place)
        self._tokens.append(token)
        top = self._request.top_logprobs
        logprob = None if top is None else token_logprob(logits, token, top, self._engine.piece)
        if self._engine.is_end(token):
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
            drafted_tokens=self._drafter.drafted,
            accepted_tokens=self._drafter.accepted,
        )


class PieceBuilder:
    """Turns tokens into pieces of text with logprobs.

    A token's logprobs are sent with the first of its text, so they wait while that is held back.
    Tokens without text send theirs at the end. A token that begins at or after a stop string sends
    none. A token that a stop string begins inside sends its own, because part of it is text.
    """

    def __init__(self, index: int, stop: tuple[str, ...]) -> None:
        self._index = index
        self._text = AnswerText(stop)
        self._sent = 0  # characters
        self._held: deque[tuple[int, TokenLogprob]] = deque()  # and where their text begins

    @property
    def stopped(self) -> str | None:
        """The stop string that has ended the text, if any."""
        return self._text.stopped

    def add(self, token: int, piece: bytes, logprob: TokenLogprob | None) -> Piece | None:
        """Add a token; return the text and logprobs that are now certain, if any."""
        if logprob:
            self._held.append((self._text.length, logprob))
        return self._piece(self._text.add(token, piece))

    def finish(self) -> Piece | None:
        """Return what was held back, because no token follows."""
        return self._piece(self._text.finish(), ended=not self.stopped)

    def _piece(self, text: str, ended: bool = False) -> Piece | None:
        self._sent += len(text)
        end = self._text.length + 1 if ended else self._sent
        logprobs = []
        while self._held and self._held[0][0] < end:
            logprobs.append(self._held.popleft()[1])
        return Piece(self._index, text, tuple(logprobs)) if text or logprobs else None


def token_logprob(
    logits: NDArray[np.float32], token: int, top: int, piece: Callable[[int], bytes]
) -> TokenLogprob:
    """Return the log-softmax of logits (n_vocab,) at `token` and at the `top` likeliest tokens.

    The likeliest tokens are sorted, the likeliest first; `piece` returns a token's bytes.
    """
    maximum = logits.max()
    # Float32 is enough for each term, but not for a sum of 152,064 of them.
    total = np.log(np.exp(logits - maximum).sum(dtype=np.float64))
    ids = [token, *_likeliest(logits, top)]
    logprobs = np.minimum(0, logits[ids].astype(np.float64) - maximum - total).tolist()
    own, *best = [(each, piece(each), value) for each, value in zip(ids, logprobs, strict=True)]
    rank = 1 + int(np.count_nonzero(logits > logits[token]))
    return TokenLogprob(*own, top=tuple(best), rank=rank)


def _check_finite(logits: NDArray[np.float32]) -> None:
    if not np.isfinite(logits.max()):
        raise Dots1Error("the model computes logits that are not finite; is its file damaged?")


def _likeliest(logits: NDArray[np.float32], count: int) -> list[int]:
    count = min(count, len(logits))
    if not count:
        return []
    chosen = np.argpartition(logits, len(logits) - count)[len(logits) - count :]
    # Of equal logits the lower id comes first, as in llama.cpp.
    order = np.lexsort((chosen, -logits[chosen]))
    found: list[int] = chosen[order].tolist()
    return found
