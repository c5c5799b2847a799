"""KV caches of earlier prompts in RAM, for slots that were given to other prompts since."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dots1_local.chat.kv_cache import common_prefix
from dots1_local.engine.engine import Engine
from dots1_local.serve.cache_slot import CacheSlot

__all__ = ["PromptCache"]

_WORTH = 32  # tokens; computing fewer is as fast as copying them


@dataclass(frozen=True)
class Copy:
    """A copy of a slot, and its part of the KV cache as llama.cpp writes it."""

    slot: CacheSlot
    state: NDArray[np.uint8]


class PromptCache:
    """Copies of slots, of at most `nbytes` together; those that were not used longest go first."""

    def __init__(self, engine: Engine, nbytes: int) -> None:
        self._engine, self._nbytes = engine, nbytes
        self._copies: list[Copy] = []  # the last one was used last

    @property
    def nbytes(self) -> int:
        """The bytes of all copies."""
        return sum(copy.state.nbytes for copy in self._copies)

    def keep(self, slot: CacheSlot, prompt: Sequence[int]) -> None:
        """Copy a slot that is given to a prompt, if the prompt does not begin as the slot does."""
        tokens = slot.tokens
        if len(tokens) - slot.common(prompt) < _WORTH:
            return
        for copy in self._copies:
            if common_prefix(copy.slot.tokens, tokens) == len(tokens):
                self._use(copy)
                return
        if self._engine.state_bytes(slot.seq_id) > self._nbytes:
            return
        self._copies = [
            copy
            for copy in self._copies
            if common_prefix(copy.slot.tokens, tokens) < len(copy.slot.tokens)
        ]
        state = self._engine.state(slot.seq_id)
        if state is None:
            return
        self._copies.append(Copy(slot.copy(), state))
        while self.nbytes > self._nbytes:
            del self._copies[0]

    def find(self, prompt: Sequence[int], top: int | None, known: int) -> Copy | None:
        """Return the copy that has most tokens of a prompt, if it has more than the `known` ones.

        With `top`, tokens whose logprobs are not known do not count. The copy counts as used.
        """
        if not self._copies:
            return None
        best = max(self._copies, key=lambda copy: copy.slot.reusable(prompt, top))
        if best.slot.reusable(prompt, top) < known + _WORTH:
            return None
        self._use(best)
        return best

    def restore(self, copy: Copy, slot: CacheSlot) -> None:
        """Let a slot hold what a copy has, or nothing if that fails."""
        if self._engine.set_state(slot.seq_id, copy.state):
            slot.tokens, slot.scores = copy.slot.tokens.copy(), copy.slot.scores.copy()
        else:
            self._engine.forget(0, slot.seq_id)
            slot.cut(0)

    def _use(self, copy: Copy) -> None:
        self._copies.remove(copy)
        self._copies.append(copy)
