"""How the next token is chosen: llama.cpp's sampler chain."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from llama_cpp import llama_cpp as llama

from dots1_local.errors import UsageError
from dots1_local.runtime.engine import Engine

__all__ = ["Sampler", "Sampling"]

_REMEMBERED = 64  # tokens that a repeat penalty looks back on, llama.cpp's default
_COLDEST = 1e-6  # below, logits divided by the temperature overflow


@dataclass(frozen=True)
class Sampling:
    """The knobs; temperature 0 always takes the likeliest token, seed None is another each time.

    Top-k 0, top-p 1, min-p 0 and repeat penalty 1 are off.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 100:
            raise UsageError(f"temperature is {self.temperature}; it goes from 0 to 100")
        if not isinstance(self.top_k, int) or not 0 <= self.top_k < 1 << 31:
            raise UsageError(f"top-k is {self.top_k}; it is a number of tokens, 0 for all")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise UsageError(f"top-p is {self.top_p} and min-p {self.min_p}; they are shares of 1")
        if not 0.1 <= self.repeat_penalty <= 10:
            raise UsageError(f"repeat penalty is {self.repeat_penalty}; it goes from 0.1 to 10")
        if self.seed is not None and not isinstance(self.seed, int):
            raise UsageError(f"seed is {self.seed}; it is a whole number")


class Sampler:
    """A chain made from `Sampling`, with its random state; `close` it after use."""

    def __init__(self, sampling: Sampling, n_vocab: int) -> None:
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        self._penalties = llama.llama_sampler_init_penalties(
            n_vocab, _REMEMBERED, sampling.repeat_penalty, 0.0, 0.0
        )
        for step in (self._penalties, *_steps(sampling)):
            llama.llama_sampler_chain_add(self._chain, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the chain; a second call does nothing."""
        if self._chain is not None:
            llama.llama_sampler_free(self._chain)
            self._chain = self._penalties = None

    def begin(self, prompt: Sequence[int]) -> None:
        """Start an answer; as in llama.cpp's server, the prompt counts as said."""
        llama.llama_sampler_reset(self._penalties)
        for token in prompt[-_REMEMBERED:]:
            llama.llama_sampler_accept(self._penalties, token)

    def next(self, engine: Engine) -> int:
        """Choose from the logits of the last token the engine was given, and remember it."""
        token: int = llama.llama_sampler_sample(self._chain, engine.context, -1)
        return token


def _steps(sampling: Sampling) -> list[Any]:
    """What follows penalties in llama.cpp's usual order: candidates are cut before temperature."""
    if sampling.temperature < _COLDEST:
        return [llama.llama_sampler_init_greedy()]
    seed = secrets.randbits(32) if sampling.seed is None else sampling.seed % (1 << 32)
    return [
        llama.llama_sampler_init_top_k(sampling.top_k),
        llama.llama_sampler_init_top_p(sampling.top_p, 1),
        llama.llama_sampler_init_min_p(sampling.min_p, 1),
        llama.llama_sampler_init_temp(sampling.temperature),
        llama.llama_sampler_init_dist(seed),
    ]
