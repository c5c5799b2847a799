"""How the next token is chosen: llama.cpp's sampler chain."""

import secrets
from dataclasses import dataclass
from typing import Self

from llama_cpp import llama_cpp as llama

from dots1_local.errors import UsageError
from dots1_local.runtime.engine import Engine

__all__ = ["Sampler", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """The knobs; temperature 0 always takes the likeliest token, seed None is another each time."""

    temperature: float = 0.7
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 100:
            raise UsageError(f"temperature is {self.temperature}; it goes from 0 up")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise UsageError(f"top-p is {self.top_p} and min-p {self.min_p}; they are shares of 1")


class Sampler:
    """A chain made from `Sampling`, with its random state; use it in a `with` statement."""

    def __init__(self, sampling: Sampling) -> None:
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        for step in _steps(sampling):
            llama.llama_sampler_chain_add(self._chain, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        llama.llama_sampler_free(self._chain)

    def next(self, engine: Engine) -> int:
        """Choose from the logits of the last token the engine was given."""
        token: int = llama.llama_sampler_sample(self._chain, engine.context, -1)
        return token


def _steps(sampling: Sampling) -> list[object]:
    """The samplers in llama.cpp's usual order: candidates are cut before temperature."""
    if sampling.temperature == 0:
        return [llama.llama_sampler_init_greedy()]
    seed = secrets.randbits(32) if sampling.seed is None else sampling.seed % (1 << 32)
    return [
        llama.llama_sampler_init_top_p(sampling.top_p, 1),
        llama.llama_sampler_init_min_p(sampling.min_p, 1),
        llama.llama_sampler_init_temp(sampling.temperature),
        llama.llama_sampler_init_dist(seed),
    ]
