"""Sampling the next token with llama.cpp's sampler chain, within a grammar if there is one.

With a grammar a token is sampled first and checked then, which takes microseconds. Only if the
grammar refuses that token are all tokens masked and another one sampled.
"""

import ctypes
import secrets
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from llama_cpp import llama_cpp as llama
from numpy.typing import NDArray

from dots1_local.chat.constraint import Constraint, TokenMatcher
from dots1_local.chat.sampling import Sampling
from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error

__all__ = ["Sampler"]

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_MIN_TEMPERATURE = 1e-6  # logits divided by less than this overflow


class Sampler:
    """A sampler chain with its random state; `close` it after use.

    With a `grammar` it samples only tokens that continue a text of the grammar, and an end token
    only where the text is complete.
    """

    def __init__(
        self, sampling: Sampling, engine: Engine, grammar: Constraint | None = None
    ) -> None:
        self._grammar, self._matcher = grammar, grammar.matcher() if grammar else None
        self._candidates = np.empty(engine.n_vocab if grammar else 0, _CANDIDATE)
        # llama.cpp allocates the window at once; no token is further back than the context is long.
        self._window = min(sampling.repeat_last_n, engine.n_ctx)
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        self._prompt_penalty = llama.llama_sampler_init_penalties(
            engine.n_vocab, self._window, sampling.repeat_penalty, 0.0, 0.0
        )
        self._answer_penalty = llama.llama_sampler_init_penalties(
            engine.n_vocab, engine.n_ctx, 1.0, sampling.frequency_penalty, sampling.presence_penalty
        )
        penalties = self._prompt_penalty, self._answer_penalty
        for step in (*_bias(sampling.logit_bias, engine.n_vocab), *penalties, *_steps(sampling)):
            llama.llama_sampler_chain_add(self._chain, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the chain; a second call does nothing."""
        if self._chain is not None:
            llama.llama_sampler_free(self._chain)
            self._chain = self._prompt_penalty = self._answer_penalty = None

    def begin(self, prompt: Sequence[int]) -> None:
        """Start an answer; as in llama.cpp's server, the repeat penalty sees the prompt."""
        llama.llama_sampler_reset(self._prompt_penalty)
        llama.llama_sampler_reset(self._answer_penalty)
        for token in prompt[max(0, len(prompt) - self._window) :]:
            llama.llama_sampler_accept(self._prompt_penalty, token)
        self._matcher = self._grammar.matcher() if self._grammar else None

    def next(self, engine: Engine, index: int = -1) -> int:
        """Sample a token from the logits at `index` in the last ubatch, and accept it.

        An `index` of -1 is the last token whose logits were computed.

        Raises:
            Dots1Error: the grammar allows no token of the model, or exceeds llguidance's limits.
        """
        if self._matcher:
            return self._constrained(self._matcher, engine, index)
        token: int = llama.llama_sampler_sample(self._chain, engine.context, index)
        return token

    def _constrained(self, matcher: TokenMatcher, engine: Engine, index: int) -> int:
        pointer = llama.llama_get_logits_ith(engine.context, index)
        logits = np.ctypeslib.as_array(pointer, shape=(engine.n_vocab,))
        token = self._sample(logits)
        if not matcher.accept(token):
            masked = np.where(matcher.mask(), logits, np.float32(-np.inf))
            token = self._sample(masked)
            if not np.isfinite(masked[token]) or not matcher.accept(token):
                raise Dots1Error("no token of the model continues the answer as it was asked for")
        llama.llama_sampler_accept(self._chain, token)
        return token

    def _sample(self, logits: NDArray[np.float32]) -> int:
        """Sample a token from logits (n_vocab,) without accepting it."""
        self._candidates["id"] = np.arange(len(logits), dtype=np.int32)
        self._candidates["logit"] = logits
        data = self._candidates.ctypes.data_as(ctypes.POINTER(llama.llama_token_data))
        array = llama.llama_token_data_array(data, len(logits), -1, False)
        llama.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(self._candidates["id"][array.selected])


def _bias(biases: Sequence[tuple[int, float]], n_vocab: int) -> list[Any]:
    if not biases:
        return []
    entries = (llama.llama_logit_bias * len(biases))(*biases)
    return [llama.llama_sampler_init_logit_bias(n_vocab, len(biases), entries)]


def _steps(sampling: Sampling) -> list[Any]:
    """Return what follows the penalties, in llama.cpp's order: cuts, then temperature."""
    if sampling.temperature < _MIN_TEMPERATURE:
        return [llama.llama_sampler_init_greedy()]
    seed = secrets.randbits(32) if sampling.seed is None else sampling.seed % (1 << 32)
    return [
        llama.llama_sampler_init_top_k(sampling.top_k),
        llama.llama_sampler_init_top_p(sampling.top_p, 1),
        llama.llama_sampler_init_min_p(sampling.min_p, 1),
        llama.llama_sampler_init_temp(sampling.temperature),
        llama.llama_sampler_init_dist(seed),
    ]
