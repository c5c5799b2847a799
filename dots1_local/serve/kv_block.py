"""A block of a KV cache: what follows a beginning of a prompt, in RAM, on disk or in both."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dots1_local.serve.generation import TokenLogprob

__all__ = ["BLOCK_TOKENS", "Block", "block_key"]

BLOCK_TOKENS = 128  # 130 MB of dots.llm1 in F16: a step of the engine takes as long as copying them


@dataclass(eq=False)
class Block:
    """The KV cache of up to BLOCK_TOKENS `tokens` from the position `start` on.

    They follow those of the block with the key `parent`, which is full. `scores` are the logprobs
    of the tokens, but of the first token of all, as far as they were asked for. `state` is the part
    of the KV cache as llama.cpp writes it, if it is in RAM.
    """

    parent: str
    start: int
    tokens: tuple[int, ...]
    scores: tuple[TokenLogprob, ...] = ()
    state: NDArray[np.uint8] | None = None
    on_disk: bool = False

    def __post_init__(self) -> None:
        self.key = block_key(self.parent, self.tokens)

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + len(self.tokens)

    @property
    def available(self) -> bool:
        """Whether the block can be restored."""
        return self.on_disk or self.state is not None


def block_key(parent: str, tokens: Sequence[int]) -> str:
    """Return the name of a beginning of a prompt: that of the parent, and the tokens after it."""
    return hashlib.blake2b(
        parent.encode() + array("i", tokens).tobytes(), digest_size=16
    ).hexdigest()
