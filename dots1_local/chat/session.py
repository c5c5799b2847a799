"""One conversation with a model on an engine: turns in, streamed answers out."""

import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from dots1_local.chat.dialogue import Dialogue, SessionOptions
from dots1_local.chat.draft import Draft, Drafter, DraftPolicy
from dots1_local.chat.kv_cache import KVCache, common_prefix
from dots1_local.chat.kv_state import AnswerTokens, opened_state
from dots1_local.chat.message import Message, Stats, StopReason
from dots1_local.chat.prompt import Prompter, RawPrompter
from dots1_local.chat.sampler import Sampler
from dots1_local.chat.sampling import Sampling
from dots1_local.chat.turns import (
    AnswerText,
    EngineTurn,
    overflow_message,
    turns_to_drop,
)
from dots1_local.engine.engine import Engine
from dots1_local.engine.log import Difference, compare
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.progress import Progress, silent

__all__ = ["Session"]

_ORDINARY = (1, 6)  # NORMAL and BYTE of enum llama_token_type


class Session(Dialogue):
    """A conversation on one engine; use it in a `with` statement.

    The KV cache keeps what turns have in common, so only what is new is computed. Answers that
    repeat earlier text are drafted from it, as `draft` says and as far as the engine was opened
    with `n_draft`.
    """

    stats: Stats | None

    def __init__(
        self,
        engine: Engine,
        system: str | None = None,
        sampling: Sampling | None = None,
        *,
        draft: Draft = "auto",
        **options: Unpack[SessionOptions],
    ) -> None:
        super().__init__(system, sampling, **options)
        self._engine = engine
        self._prompter = RawPrompter(engine) if self.raw else Prompter(engine)
        self._cache = KVCache(engine)
        self._drafter = Drafter(DraftPolicy.choose(draft, engine))
        self._sampler = Sampler(self._sampling, engine)

    def __exit__(self, *exception: object) -> None:
        self._sampler.close()

    @property
    def sampling(self) -> Sampling:
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        before, self._sampler = self._sampler, Sampler(sampling, self._engine)
        self._sampling = sampling
        before.close()

    @property
    def model(self) -> str:
        return self._engine.gguf.files[0].name

    @property
    def n_ctx(self) -> int:
        return self._engine.n_ctx

    @property
    def context_used(self) -> int:
        return len(self._cache)

    @property
    def memory(self) -> tuple[Difference, ...]:
        """The memory that the engine takes of each device; without a plan `predicted` is 0."""
        return compare(self._engine.report, self._engine.predicted)

    def count(self, text: str) -> int:
        return len(self._prompter.content(Message("user", text)))

    def save_state(self, path: str | Path, progress: Progress = silent) -> int:
        """Write the KV cache; return the bytes written, 0 if the file is up to date."""
        self._end_latest()
        self._cache.keep(self._prompter.tokens(self.context) if self.messages else [])
        answers = [each.tokens for each in self.messages if each.role == "assistant"]
        return self._cache.save(Path(path), answers, progress)

    def load_state(self, path: str | Path) -> int:
        """Load a KV cache, unless it is damaged or of another model, context or conversation."""
        self._end_latest()
        with opened_state(Path(path), self._engine) as state:
            if state is None or not self.messages:
                return 0
            self.messages = _with_tokens(self.messages, state.answers, self._engine)
            tokens = self._prompter.tokens(self.context)
            if common_prefix(tokens, state.tokens):
                self._cache.restore(Path(path), state)
                return self._cache.keep(tokens)
        return 0

    def _answer(
        self, asked: list[Message], limit: int | None, progress: Progress
    ) -> Generator[str, None, None]:
        turn = EngineTurn(asked, limit, progress, AnswerText(self.stop), self.dropped)
        self._fit(turn)
        if not turn.prompt:
            raise UsageError("there is nothing to complete; give the beginning of a text")
        if turn.size >= self.n_ctx:
            remedy = "choose a larger context with --context"
            raise Dots1Error(overflow_message(turn.context, turn.size, self.n_ctx, remedy))
        return self._streamed(turn, self._compute(turn))

    def _compute(self, turn: EngineTurn) -> Generator[str, None, None]:
        start = time.perf_counter()
        prompt_tokens, reused = len(turn.prompt), self._cache.hold(turn.prompt, turn.progress)
        self._sampler.begin(turn.prompt)
        self._drafter.begin(turn.prompt)
        begun = time.perf_counter()
        try:
            yield from self._generate(turn)
        finally:
            self.messages = [*turn.messages, turn.answer.message()]
            dropped, self.dropped = turn.dropped - self.dropped, turn.dropped
            reading, writing = begun - start, time.perf_counter() - begun
            stop: StopReason = "stop" if turn.answer.stopped else turn.stop
            count = len(turn.answer.tokens)
            drafts = self._drafter.drafted, self._drafter.accepted
            self.stats = Stats(
                prompt_tokens, reused, count, reading, writing, stop, dropped, *drafts
            )
            self._drafter.end()
            self._cache.drop_draft()

    def _generate(self, turn: EngineTurn) -> Generator[str, None, None]:
        answer = turn.answer
        while turn.stop == "interrupted" and not answer.stopped:
            token = self._sampler.next(self._engine, self._cache.row)
            if self._engine.is_end(token):
                turn.stop = "end"
                break
            yield answer.add(token, self._engine.piece(token))
            if len(answer.tokens) == turn.limit:
                turn.stop = "length"
            elif not answer.stopped and not self._continue(turn, token):
                turn.stop = "context"
        if held := answer.finish():
            yield held

    def _continue(self, turn: EngineTurn, token: int) -> bool:
        """Compute the last token of the answer; return False if the context has no room for it."""
        if self._drafter.accept(token):
            self._cache.accept(token)
            return True
        if turn.size < self.n_ctx:
            self._step(turn, token)
            return True
        self._fit(turn)
        if turn.size >= self.n_ctx:
            return False
        self._cache.hold([*turn.prompt, *turn.answer.tokens], turn.progress)
        return True

    def _step(self, turn: EngineTurn, token: int) -> None:
        """Compute the last token of the answer, and a draft that leaves room for one more token."""
        room = self.n_ctx - turn.size
        if turn.limit:
            room = min(room, turn.limit - len(turn.answer.tokens))
        draft = self._drafter.propose(room - 1)
        start = time.perf_counter()
        self._cache.append([token], draft)
        self._drafter.computed(time.perf_counter() - start)

    def _fit(self, turn: EngineTurn) -> None:
        """Make the prompt; drop turns if the answer would have no room."""
        turn.prompt = self._prompter.tokens(turn.context)
        quarter, written = self.n_ctx // 4, len(turn.answer.tokens)
        room = min(turn.limit - written, quarter) if turn.limit else quarter
        limit = self.n_ctx - written - max(1, room)
        if self.overflow == "stop" or len(turn.prompt) <= limit:
            return
        turn.dropped += turns_to_drop(
            turn.context, lambda kept: len(self._prompter.tokens(kept)), limit
        )
        turn.prompt = self._prompter.tokens(turn.context)


def _with_tokens(
    messages: Sequence[Message], answers: AnswerTokens, engine: Engine
) -> list[Message]:
    """Give answers the tokens that a file has for them, one after another.

    Tokens that do not make up just the answer's text are ignored. Without tokens the text is
    tokenised, perhaps otherwise than the model wrote it.
    """
    left = iter(answers)
    tokens = [next(left, None) if each.role == "assistant" else None for each in messages]
    return [
        replace(message, tokens=tuple(claim))
        if claim and message.tokens is None and _spells(claim, message.text, engine)
        else message
        for message, claim in zip(messages, tokens, strict=True)
    ]


def _spells(tokens: Sequence[int], text: str, engine: Engine) -> bool:
    """Whether these are ordinary tokens that make up just the text."""
    kinds = engine.gguf.keys.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, list):
        return False
    known = min(engine.n_vocab, len(kinds))
    if not all(0 <= token < known and kinds[token] in _ORDINARY for token in tokens):
        return False
    return b"".join(map(engine.piece, tokens)).decode("utf-8", errors="replace") == text
