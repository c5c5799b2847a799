"""How the next token is sampled: the parameters and their ranges."""

import math
from dataclasses import dataclass

from dots1_local.errors import UsageError

__all__ = ["Sampling"]


@dataclass(frozen=True)
class Sampling:
    """Parameters of sampling.

    Temperature 0 always takes the likeliest token. With seed None every answer is different. Top-k
    0, top-p 1, min-p 0, repeat penalty 1 and the other penalties at 0 have no effect.

    The repeat penalty weakens tokens among the last `repeat_last_n`, prompt included. OpenAI's two
    penalties lower the logits of tokens in the answer so far: the frequency penalty once for each
    occurrence, the presence penalty once. `logit_bias` adds to the logits of tokens, minus infinity
    bans a token; ids that the model does not have are ignored.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    repeat_last_n: int = 64  # llama.cpp's default

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 100:
            raise UsageError(
                f"temperature is {self.temperature}; it must be from 0 to less than 100"
            )
        if not isinstance(self.top_k, int) or not 0 <= self.top_k < 1 << 31:
            raise UsageError(f"top-k is {self.top_k}; it must be a number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise UsageError(
                f"top-p is {self.top_p} and min-p is {self.min_p}; top-p must be above 0, and both "
                "must be at most 1"
            )
        if not 0.1 <= self.repeat_penalty <= 10:
            raise UsageError(f"repeat penalty is {self.repeat_penalty}; it must be from 0.1 to 10")
        if not 0 <= self.repeat_last_n < 1 << 31:
            raise UsageError(f"repeat last n is {self.repeat_last_n}; it must be at least 0")
        if self.seed is not None and not isinstance(self.seed, int):
            raise UsageError(f"seed is {self.seed}; it must be an integer")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                label = name.replace("_", " ")
                raise UsageError(f"{label} is {getattr(self, name)}; it must be from -2 to 2")
        for token, bias in self.logit_bias:
            if not isinstance(token, int) or not 0 <= token < 1 << 31:
                raise UsageError(f"logit bias is for token {token}; token ids are integers from 0")
            if not -100 <= bias <= 100 and bias != -math.inf:
                raise UsageError(
                    f"logit bias of token {token} is {bias}; it must be from -100 to 100"
                )
