"""The choice of the next token: llama.cpp's sampler chain."""

import secrets
from collections.abc import Sequence
from typing import Any, Self

from llama_cpp import llama_cpp as llama

from dots1_local.chat.constraint import Constraint
from dots1_local.chat.grammar import Grammar
from dots1_local.chat.sampling import Sampling
from dots1_local.engine.engine import Engine

__all__ = ["Sampler"]

_REMEMBERED = 64  # tokens that a repeat penalty looks back on, llama.cpp's default
_COLDEST = 1e-6  # below, logits divided by the temperature overflow


class Sampler:
    """A chain made from `Sampling`, with its random state; `close` it after use.

    With a `grammar` only tokens that continue a text of it are chosen, and an end token only
    where the text is complete.

    Raises:
        Dots1Error: the model cannot be kept to a grammar.
    """

    def __init__(self, sampling: Sampling, engine: Engine, grammar: Grammar | None = None) -> None:
        self._constraint = Constraint(grammar, engine) if grammar else None
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        self._prompted = llama.llama_sampler_init_penalties(
            engine.n_vocab, _REMEMBERED, sampling.repeat_penalty, 0.0, 0.0
        )
        self._written = llama.llama_sampler_init_penalties(
            engine.n_vocab,
            engine.n_ctx,
            1.0,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
        bias = _bias(sampling.logit_bias, engine.n_vocab)
        for step in (*bias, self._prompted, self._written, *_steps(sampling)):
            llama.llama_sampler_chain_add(self._chain, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the chain; a second call does nothing."""
        if self._chain is not None:
            llama.llama_sampler_free(self._chain)
            self._chain = self._prompted = self._written = None
        if self._constraint:
            self._constraint.close()

    def begin(self, prompt: Sequence[int]) -> None:
        """Start an answer; as in llama.cpp's server, the repeat penalty sees the prompt."""
        llama.llama_sampler_reset(self._prompted)
        llama.llama_sampler_reset(self._written)
        for token in prompt[-_REMEMBERED:]:
            llama.llama_sampler_accept(self._prompted, token)
        if self._constraint:
            self._constraint.begin()

    def next(self, engine: Engine, index: int = -1) -> int:
        """Choose a token from the logits of the one at `index` in the last ubatch, and accept it.

        An `index` of -1 is the last token whose logits were wanted.

        Raises:
            Dots1Error: the grammar allows no token of the model.
        """
        if self._constraint:
            return self._constraint.next(self._chain, engine, index)
        token: int = llama.llama_sampler_sample(self._chain, engine.context, index)
        return token


def _bias(biases: Sequence[tuple[int, float]], n_vocab: int) -> list[Any]:
    if not biases:
        return []
    entries = (llama.llama_logit_bias * len(biases))(*biases)
    return [llama.llama_sampler_init_logit_bias(n_vocab, len(biases), entries)]


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
