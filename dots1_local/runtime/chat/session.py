"""One conversation with a model: turns in, streamed answers out."""

import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Literal, Self
from weakref import ref

from dots1_local.errors import Dots1Error, UsageError
from dots1_local.progress import Progress, silent
from dots1_local.runtime.chat.answer_tokens import with_tokens
from dots1_local.runtime.chat.kv_cache import KVCache, common_prefix
from dots1_local.runtime.chat.kv_state_file import opened_state
from dots1_local.runtime.chat.prompt import Message, Prompter, RawPrompter
from dots1_local.runtime.chat.sampling import Sampler, Sampling
from dots1_local.runtime.chat.stats import Stats, StopReason
from dots1_local.runtime.chat.stopping import AnswerText
from dots1_local.runtime.chat.turns import Turn, count_turns, drop_oldest, last_turn, turns_to_drop
from dots1_local.runtime.engine import Engine
from dots1_local.runtime.report import Difference, compare

__all__ = ["SYSTEM_PROMPT", "Overflow", "Session", "Stats", "StopReason"]

# With an empty system prompt the model is reported to drift off topic; this is what others use.
SYSTEM_PROMPT = "You are a helpful assistant."

Overflow = Literal["drop", "stop"]


class Session:
    """A conversation on one engine; use it in a `with` statement.

    The KV cache keeps what turns have in common: only what is new is computed. `raw` completes
    texts without the chat template; the conversation is then one document, and `system`, which is
    `SYSTEM_PROMPT` for a chat unless given, none. Where the context is full, `overflow` "drop"
    gives up whole oldest turns, and "stop" ends the answer or refuses the question.
    """

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
        self._sampling = sampling or Sampling()
        self._sampler = Sampler(self._sampling, engine.n_vocab)
        self._raw = raw
        self.overflow: Overflow = overflow
        self.stop = stop
        self.max_tokens = max_tokens
        self.messages: list[Message] = []
        self.stats: Stats | None = None
        self._turn: Turn | None = None
        self._latest: Callable[[], Generator[str, None, None] | None] = lambda: None
        default = "" if raw else SYSTEM_PROMPT
        self.system = default if system is None else system

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._sampler.close()

    @property
    def system(self) -> str:
        """The system message at the beginning of the conversation, "" for none."""
        first = self.messages[:1]
        return first[0].text if first and first[0].role == "system" else ""

    @system.setter
    def system(self, text: str) -> None:
        others = [message for message in self.messages if message.role != "system"]
        self.messages = [Message("system", text), *others] if text else others

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; setting it starts the random numbers anew."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        before, self._sampler = self._sampler, Sampler(sampling, self._engine.n_vocab)
        self._sampling = sampling
        before.close()

    @property
    def raw(self) -> bool:
        """Whether texts are completed without the chat template."""
        return self._raw

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

    @property
    def so_far(self) -> list[Message]:
        """The messages, with a turn in the making: its question and what is answered by now."""
        turn = self._turn
        if turn is None:
            return self.messages
        return [*turn.messages, turn.answer.message()] if turn.answer.tokens else turn.messages

    def count(self, text: str) -> int:
        """How many tokens a text is."""
        return len(self._prompter.content(Message("user", text)))

    def clear(self) -> None:
        """Drop all turns; the system message stays."""
        self._end_latest()
        self.messages = [message for message in self.messages if message.role == "system"]

    def undo(self) -> Message | None:
        """Drop the last turn; the user's message of it, None if there is none."""
        self._end_latest()
        index = last_turn(self.messages)
        if index is None:
            return None
        asked, self.messages = self.messages[index], self.messages[:index]
        return asked

    def ask(
        self, text: str, max_tokens: int | None = None, *, progress: Progress = silent
    ) -> Generator[str, None, None]:
        """Say `text` and stream the answer, whole characters at a time.

        There is a piece for every token, empty where its text is not certain yet. The turn becomes
        part of the conversation when the answer ends, also where it is cut off by `max_tokens`, the
        context, the caller closing the stream, or the next question; `stats` tells which.
        `progress` hears of the prompt's new tokens after every ubatch; an exception from it leaves
        the conversation as it was.

        Raises:
            Dots1Error: the question does not fit into the context.
            UsageError: there is nothing to complete, or a stop string is empty.
            GGUFError: the chat template fails.
        """
        self._end_latest()
        limit = self.max_tokens if max_tokens is None else max_tokens
        return self._answer([*self.messages, Message("user", text)], limit, progress)

    def regenerate(self, *, progress: Progress = silent) -> Generator[str, None, None]:
        """Answer the last question again, in place of the last answer; as `ask`.

        Raises:
            UsageError: there is no answer yet.
        """
        self._end_latest()
        index = last_turn(self.messages)
        if index is None:
            raise UsageError("there is no answer to make again; ask something first")
        return self._answer(self.messages[: index + 1], self.max_tokens, progress)

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
        if limit is not None and limit < 1:
            raise UsageError(f"an answer of at most {limit} tokens is none; give 1 or more")
        turn = Turn(asked, limit, AnswerText(self.stop), progress)
        self._fit(turn)
        if not turn.prompt:
            raise UsageError("there is nothing to complete; give the beginning of a text")
        if turn.size >= self.n_ctx:
            raise Dots1Error(self._refusal(turn))
        stream = self._stream(turn)
        self._latest = ref(stream)  # who drops the stream closes it
        return stream

    def _end_latest(self) -> None:
        """End an answer that is still open; later it would write over what came after it."""
        if (stream := self._latest()) is not None:
            stream.close()

    def _refusal(self, turn: Turn) -> str:
        if count_turns(turn.messages) > 1:
            what, remedy = "with this question the conversation", "set overflow to drop"
        else:
            what, remedy = "the prompt alone", "shorten it"
        return (
            f"{what} is {turn.size:,} tokens long and the context holds {self.n_ctx:,}; {remedy}, "
            "or choose a larger context with --context"
        )

    def _stream(self, turn: Turn) -> Generator[str, None, None]:
        self._turn = turn
        try:
            yield from self._computed(turn)
        finally:
            self._turn = None

    def _computed(self, turn: Turn) -> Generator[str, None, None]:
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

    def _generate(self, turn: Turn) -> Generator[str, None, None]:
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

    def _go_on(self, turn: Turn, token: int) -> bool:
        """Compute the token that was written last; False where the context has no room for it."""
        if turn.size < self.n_ctx:
            self._cache.add(token)
            return True
        self._fit(turn)
        if turn.size >= self.n_ctx:
            return False
        self._cache.hold([*turn.prompt, *turn.answer.tokens], turn.progress)
        return True

    def _fit(self, turn: Turn) -> None:
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
