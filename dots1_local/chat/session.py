"""The tokens that a model wrote as its answers, where only a file says so.

One conversation with a model on an engine: turns in, streamed answers out.
"""

import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dots1_local.chat.dialogue import SYSTEM_PROMPT, Dialogue, Overflow
from dots1_local.chat.kv_cache import KVCache, common_prefix
from dots1_local.chat.kv_state import opened_state
from dots1_local.chat.message import Message, Stats, StopReason
from dots1_local.chat.prompt import Prompter, RawPrompter
from dots1_local.chat.sampler import Sampler
from dots1_local.chat.sampling import Sampling
from dots1_local.chat.turns import AnswerText, EngineTurn, blame, drop_oldest, turns_to_drop
from dots1_local.engine.engine import Engine
from dots1_local.engine.log import Difference, compare
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.progress import Progress, silent

__all__ = [
    "SYSTEM_PROMPT",
    "Overflow",
    "Session",
    "Stats",
    "StopReason",
    "with_tokens",
]


_ORDINARY = (1, 6)  # NORMAL and BYTE of enum llama_token_type


def with_tokens(
    messages: Sequence[Message], claims: Sequence[Any], engine: Engine
) -> list[Message]:
    """The messages, their answers with the tokens that are claimed for them in turn.

    A claim is believed if it is of ordinary tokens, which make up just the answer's text; without
    tokens, the text is tokenised, maybe otherwise than the model wrote it.
    """
    left, told = iter(claims), []
    for message in messages:
        claim = next(left, None) if message.role == "assistant" else None
        known = message.tokens is not None or claim is None
        told.append(
            message if known else replace(message, tokens=_believed(message.text, claim, engine))
        )
    return told


def _believed(text: str, claim: Any, engine: Engine) -> tuple[int, ...] | None:
    kinds = engine.gguf.keys.get("tokenizer.ggml.token_type")
    if not isinstance(claim, list) or not isinstance(kinds, list):
        return None
    for token in claim:
        if type(token) is not int or not 0 <= token < min(engine.n_vocab, len(kinds)):
            return None
        if kinds[token] not in _ORDINARY:
            return None
    said = b"".join(map(engine.piece, claim)).decode("utf-8", errors="replace")
    return tuple(claim) if said == text else None


class Session(Dialogue):
    """A conversation on one engine; use it in a `with` statement.

    The KV cache keeps what turns have in common: only what is new is computed.
    """

    stats: Stats | None

    def __init__(
        self,
        engine: Engine,
        system: str | None = None,
        sampling: Sampling | None = None,
        *,
        raw: bool = False,
        overflow: Overflow = "drop",
        stop: tuple[str, ...] = (),
        max_tokens: int | None = None,
    ) -> None:
        self._engine = engine
        self._prompter = RawPrompter(engine) if raw else Prompter(engine)
        self._cache = KVCache(engine)
        super().__init__(
            system, sampling, raw=raw, overflow=overflow, stop=stop, max_tokens=max_tokens
        )
        self._sampler = Sampler(self._sampling, engine)

    def __exit__(self, *exception: object) -> None:
        self._sampler.close()

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; setting it starts the random numbers anew."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        before, self._sampler = self._sampler, Sampler(sampling, self._engine)
        self._sampling = sampling
        before.close()

    @property
    def model(self) -> str:
        """The name of the model's file."""
        return self._engine.gguf.files[0].name

    @property
    def n_ctx(self) -> int:
        """Tokens the context holds."""
        return self._engine.n_ctx

    @property
    def context_used(self) -> int:
        """Tokens in the KV cache now."""
        return len(self._cache)

    @property
    def memory(self) -> tuple[Difference, ...]:
        """What the engine takes of each device; `predicted` is 0 everywhere without a plan."""
        return compare(self._engine.report, self._engine.predicted)

    def count(self, text: str) -> int:
        """How many tokens a text is."""
        return len(self._prompter.content(Message("user", text)))

    def save_state(self, path: str | Path, progress: Progress = silent) -> int:
        """Write the KV cache of the messages; the bytes written, 0 where the file is up to date.

        Raises:
            Dots1Error: it cannot be written there.
        """
        self._end_latest()
        self._cache.keep(self._prompter.tokens(self.messages) if self.messages else [])
        answers = [each.tokens for each in self.messages if each.role == "assistant"]
        return self._cache.save(Path(path), answers, progress)

    def load_state(self, path: str | Path) -> int:
        """Take up a KV cache that `save_state` wrote: how many of the messages' tokens it spares.

        What is damaged, or of another model, context or conversation, spares none.
        """
        self._end_latest()
        with opened_state(Path(path), self._engine) as state:
            if state is None or not self.messages:
                return 0
            self.messages = with_tokens(self.messages, state.answers, self._engine)
            tokens = self._prompter.tokens(self.messages)
            if common_prefix(tokens, state.tokens):
                self._cache.restore(Path(path), state)
                return self._cache.keep(tokens)
        return 0

    def _answer(
        self, asked: list[Message], limit: int | None, progress: Progress
    ) -> Generator[str, None, None]:
        turn = EngineTurn(asked, limit, progress, AnswerText(self.stop))
        self._fit(turn)
        if not turn.prompt:
            raise UsageError("there is nothing to complete; give the beginning of a text")
        if turn.size >= self.n_ctx:
            raise Dots1Error(self._refusal(turn))
        return self._streamed(turn, self._computed(turn))

    def _refusal(self, turn: EngineTurn) -> str:
        what, remedy = blame(turn.messages)
        return (
            f"{what} is {turn.size:,} tokens long and the context holds {self.n_ctx:,}; {remedy}, "
            "or choose a larger context with --context"
        )

    def _computed(self, turn: EngineTurn) -> Generator[str, None, None]:
        start = time.perf_counter()
        prompt_tokens, reused = len(turn.prompt), self._cache.hold(turn.prompt, turn.progress)
        self._sampler.begin(turn.prompt)
        begun = time.perf_counter()
        try:
            yield from self._generate(turn)
        finally:
            self.messages = [*turn.messages, turn.answer.message()]
            self.stats = Stats(
                prompt_tokens,
                reused,
                len(turn.answer.tokens),
                begun - start,
                time.perf_counter() - begun,
                "stop" if turn.answer.stopped else turn.stop,
                turn.dropped,
            )

    def _generate(self, turn: EngineTurn) -> Generator[str, None, None]:
        answer = turn.answer
        while turn.stop == "interrupted" and not answer.stopped:
            token = self._sampler.next(self._engine)
            if self._engine.is_end(token):
                turn.stop = "end"
                break
            yield answer.add(token, self._engine.piece(token))
            if len(answer.tokens) == turn.limit:
                turn.stop = "length"
            elif not answer.stopped and not self._go_on(turn, token):
                turn.stop = "context"
        if held := answer.finish():
            yield held

    def _go_on(self, turn: EngineTurn, token: int) -> bool:
        """Compute the token that was written last; False where the context has no room for it."""
        if turn.size < self.n_ctx:
            self._cache.add(token)
            return True
        self._fit(turn)
        if turn.size >= self.n_ctx:
            return False
        self._cache.hold([*turn.prompt, *turn.answer.tokens], turn.progress)
        return True

    def _fit(self, turn: EngineTurn) -> None:
        """Make the prompt, without as many turns as leaves room for the answer to go on."""
        turn.prompt = self._prompter.tokens(turn.messages)
        quarter, written = self.n_ctx // 4, len(turn.answer.tokens)
        room = min(turn.limit - written, quarter) if turn.limit else quarter
        limit = self.n_ctx - written - max(1, room)
        if self.overflow == "stop" or len(turn.prompt) <= limit:
            return
        count = turns_to_drop(turn.messages, lambda kept: len(self._prompter.tokens(kept)), limit)
        turn.messages = drop_oldest(turn.messages, count)
        turn.prompt = self._prompter.tokens(turn.messages)
        turn.dropped += count
