"""A conversation with a local or a remote model: messages, settings, and one open answer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypedDict
from weakref import ref

from dots1_local.chat.message import AnswerStats, Message
from dots1_local.chat.sampling import Sampling
from dots1_local.chat.turns import Turn, count_turns, drop_oldest, last_turn
from dots1_local.errors import UsageError
from dots1_local.progress import Progress, silent

if TYPE_CHECKING:
    from dots1_local.engine.log import Difference

__all__ = ["SYSTEM_PROMPT", "Dialogue", "Overflow", "SessionOptions"]

# With an empty system prompt the model is reported to drift off topic; others use this one.
SYSTEM_PROMPT = "You are a helpful assistant."

Overflow = Literal["drop", "stop"]


class SessionOptions(TypedDict, total=False):
    """Options of every session; `Dialogue` describes them."""

    raw: bool
    overflow: Overflow
    stop: tuple[str, ...]
    max_tokens: int | None


class Dialogue(ABC):
    """A conversation with a model; use it in a `with` statement.

    The default of `system` is `SYSTEM_PROMPT`. With `raw` there is no system message by default;
    texts are completed without the chat template, and the conversation is one document.

    When the context is full, `overflow` "drop" drops whole turns from it, oldest first, and "stop"
    ends the answer or refuses the question. `messages` keeps all turns; `dropped` says how many of
    them are not in the `context`. An answer ends before a `stop` string, and after
    `max_tokens` tokens.
    """

    def __init__(
        self,
        system: str | None,
        sampling: Sampling | None,
        *,
        raw: bool = False,
        overflow: Overflow = "drop",
        stop: tuple[str, ...] = (),
        max_tokens: int | None = None,
    ) -> None:
        self._sampling = sampling or Sampling()
        self.raw = raw
        self.overflow: Overflow = overflow
        self.stop = stop
        self.max_tokens = max_tokens
        self.messages: list[Message] = []
        self.dropped = 0
        self.stats: AnswerStats | None = None  # of the last answer
        self._turn: Turn | None = None
        self._latest: Callable[[], Generator[str, None, None] | None] = lambda: None
        default = "" if raw else SYSTEM_PROMPT
        self.system = default if system is None else system

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end_latest()

    @property
    @abstractmethod
    def model(self) -> str:
        """The model's name."""

    @property
    def title(self) -> str:
        """The model, and its server if it has one."""
        return self.model

    @property
    @abstractmethod
    def n_ctx(self) -> int | None:
        """Tokens the context holds; None if unknown."""

    @property
    @abstractmethod
    def context_used(self) -> int | None:
        """Tokens in the context after the last answer; None if unknown."""

    @property
    def memory(self) -> tuple["Difference", ...]:
        """The memory that the model takes of each device of this machine."""
        return ()

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
        """How tokens are sampled; setting it restarts the random numbers."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._sampling = sampling

    @property
    def context(self) -> list[Message]:
        """The messages that the model sees: all but the oldest turns that were dropped."""
        return drop_oldest(self.messages, self.dropped)

    @property
    def so_far(self) -> list[Message]:
        """The messages, with the question and the unfinished answer of an open turn."""
        if self._turn is None:
            return self.messages
        answer = self._turn.answer.message()
        return [*self._turn.messages, answer] if answer.text else self._turn.messages

    @abstractmethod
    def count(self, text: str) -> int | None:
        """Return how many tokens a text is; None if that is unknown."""

    def clear(self) -> None:
        """Drop all turns; the system message stays."""
        self._end_latest()
        self.messages = [message for message in self.messages if message.role == "system"]
        self.dropped = 0

    def undo(self) -> Message | None:
        """Drop the last turn and return its user's message; None if there is no turn."""
        self._end_latest()
        index = last_turn(self.messages)
        if index is None:
            return None
        asked, self.messages = self.messages[index], self.messages[:index]
        if self.dropped >= count_turns(self.messages):  # the context may have room for them again
            self.dropped = 0
        return asked

    def ask(
        self, text: str, max_tokens: int | None = None, *, progress: Progress = silent
    ) -> Generator[str, None, None]:
        """Ask `text` and stream the answer in whole characters.

        There is a piece for every token; it is empty while the token's text is not certain. The
        turn becomes part of the conversation when the answer ends, even if `max_tokens`, the
        context, the next question or the caller (by closing the stream) ends it; `stats` tells
        which. `progress` is called after every ubatch of the prompt, or often while waiting for a
        server. If it raises before the first piece, the conversation stays as it was.

        Raises:
            Dots1Error: the question does not fit into the context, or the server fails.
            UsageError: there is nothing to complete, or a stop string is empty.
            GGUFError: the chat template fails.
        """
        self._end_latest()
        limit = self.max_tokens if max_tokens is None else max_tokens
        return self._open([*self.messages, Message("user", text)], limit, progress)

    def regenerate(self, *, progress: Progress = silent) -> Generator[str, None, None]:
        """Answer the last question again, and replace the last answer; otherwise like `ask`.

        Raises:
            UsageError: there is no answer yet.
        """
        self._end_latest()
        index = last_turn(self.messages)
        if index is None:
            raise UsageError("there is no answer to replace; ask something first")
        return self._open(self.messages[: index + 1], self.max_tokens, progress)

    def save_state(self, path: str | Path, progress: Progress = silent) -> int:
        """Write state that saves computing the messages again; return the bytes written.

        Raises:
            Dots1Error: the file cannot be written.
        """
        self._end_latest()
        return 0

    def load_state(self, path: str | Path) -> int:
        """Load what `save_state` wrote; return how many of the messages' tokens it has."""
        self._end_latest()
        return 0

    @abstractmethod
    def _answer(
        self, asked: list[Message], limit: int | None, progress: Progress
    ) -> Generator[str, None, None]:
        """Return the stream of an answer to the last of `asked`; see `_streamed`."""

    def _open(
        self, asked: list[Message], limit: int | None, progress: Progress
    ) -> Generator[str, None, None]:
        if limit is not None and limit < 1:
            raise UsageError(f"max_tokens is {limit}; it must be at least 1")
        self.dropped = max(0, min(self.dropped, count_turns(asked) - 1))
        stream = self._answer(asked, limit, progress)
        self._latest = ref(stream)  # weak: a caller who drops the stream closes it
        return stream

    def _streamed(
        self, turn: Turn, pieces: Generator[str, None, None]
    ) -> Generator[str, None, None]:
        """Yield the pieces of an answer; meanwhile `so_far` has its turn."""
        self._turn = turn
        try:
            yield from pieces
        finally:
            self._turn = None

    def _end_latest(self) -> None:
        """End an answer that is still open; if it ended later, it would overwrite what follows."""
        if (stream := self._latest()) is not None:
            stream.close()
