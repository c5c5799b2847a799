"""Messages of a conversation, and statistics of an answer."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["AnswerStats", "Message", "Stats", "StopReason", "ToolCall"]


@dataclass(frozen=True)
class ToolCall:
    """The model's call of a tool; `arguments` is a JSON object as text."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One message; `tokens` are those that the model wrote, if they are known.

    The text may tokenise to other tokens. An assistant's message may end in `tool_calls`. A tool's
    message is the result of the call `tool_call_id`.
    """

    role: Literal["system", "user", "assistant", "tool"]
    text: str
    tokens: tuple[int, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


StopReason = Literal["end", "stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class AnswerStats:
    """Tokens and seconds of an answer; figures that a server does not give are None.

    `reused_tokens` of the prompt were in the KV cache. With `estimate`, `generated_tokens` is an
    estimate. A `stop` of "end" is the model's own end, and "stop" is a stop string. `dropped_turns`
    is how many turns were dropped to make room. Of `drafted_tokens`, `accepted_tokens` were right.
    """

    prompt_tokens: int | None
    reused_tokens: int | None
    generated_tokens: int
    prompt_seconds: float
    generation_seconds: float
    stop: StopReason
    dropped_turns: int = 0
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None
    estimate: bool = False

    @property
    def read_tokens(self) -> int | None:
        """Tokens of the prompt that were computed."""
        if self.prompt_tokens is None or self.reused_tokens is None:
            return None
        return self.prompt_tokens - self.reused_tokens

    @property
    def prompt_speed(self) -> float | None:
        """Tokens per second of the part of the prompt that was computed."""
        read = self.read_tokens
        return None if read is None else _speed(read, self.prompt_seconds)

    @property
    def generation_speed(self) -> float:
        """Tokens per second."""
        return _speed(self.generated_tokens, self.generation_seconds)


@dataclass(frozen=True)
class Stats(AnswerStats):
    """Statistics of an engine's answer, which knows how many tokens its prompt has."""

    prompt_tokens: int
    reused_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0


def _speed(tokens: int, seconds: float) -> float:
    return tokens / max(seconds, 1e-9)
