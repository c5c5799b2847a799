"""What one of the engine's sequences holds in the KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from dots1_local.chat.kv_cache import common_prefix
from dots1_local.serve.generation import TokenLogprob

__all__ = ["CacheSlot"]


@dataclass(eq=False)
class CacheSlot:
    """A sequence of the engine and the tokens in its KV cache, which a free slot keeps.

    `scores` are the logprobs of the tokens after the first one, as far as they were asked for.
    While the slot is restored from the prompt cache, it will hold `restoring` tokens.
    """

    seq_id: int
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenLogprob] = field(default_factory=list)
    free: bool = True
    restoring: int = 0
    released: int = 0  # the higher the number, the later the release

    def common(self, *prompts: Sequence[int]) -> int:
        """Return the length of the longest prefix that the slot shares with one of the prompts."""
        return max((common_prefix(self.tokens, prompt) for prompt in prompts), default=0)

    def reusable(self, prompt: Sequence[int], top: int | None) -> int:
        """Return how many tokens of a prompt need not be computed.

        If each token's logprob is wanted, with those of the `top` likeliest, they end before the
        first token after which an unknown one comes.
        """
        common = self.common(prompt)
        if top is None:
            return common
        scored = takewhile(lambda score: len(score.top) >= top, self.scores[: max(0, common - 1)])
        return sum(1 for _ in scored)

    def cut(self, length: int) -> None:
        """Drop all but the first `length` tokens."""
        del self.tokens[length:], self.scores[max(0, length - 1) :]
