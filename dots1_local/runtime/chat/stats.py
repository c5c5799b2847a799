"""How an answer went, in tokens and seconds."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Stats", "StopReason"]

StopReason = Literal["end", "stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class Stats:
    """How the last answer went; `reused_tokens` of the prompt were still in the KV cache.

    Of `stop`, "end" is the model's own, "stop" a stop string. `dropped_turns` had to make room.
    """

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    prompt_seconds: float
    generation_seconds: float
    stop: StopReason
    dropped_turns: int = 0

    @property
    def prompt_speed(self) -> float:
        """Tokens a second over what had to be computed."""
        return (self.prompt_tokens - self.reused_tokens) / max(self.prompt_seconds, 1e-9)

    @property
    def generation_speed(self) -> float:
        """Tokens a second."""
        return self.generated_tokens / max(self.generation_seconds, 1e-9)
