"""The engine's sequences: what each one holds in the KV cache, and which prefixes they share."""

from collections.abc import Iterator, Sequence
from itertools import count

from dots1_local.engine.engine import Engine
from dots1_local.serve.cache_slot import CacheSlot
from dots1_local.serve.prompt_cache import PromptCache

__all__ = ["Slots"]


class Slots:
    """All sequences of an engine, at first empty.

    What a slot held before it is taken stays in a cache of `cache_bytes` in RAM.
    """

    def __init__(self, engine: Engine, cache_bytes: int = 0) -> None:
        self._engine = engine
        self._cache = PromptCache(engine, cache_bytes)
        self._slots = [CacheSlot(seq_id) for seq_id in range(engine.params.n_sequences)]
        self._releases = count(1)
        self.forget()

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[CacheSlot]:
        return iter(self._slots)

    @property
    def any_free(self) -> bool:
        """Whether a slot can be taken."""
        return any(slot.free for slot in self._slots)

    def take(
        self,
        prompt: Sequence[int],
        next_in_line: Sequence[Sequence[int]],
        top: int | None = None,
    ) -> CacheSlot:
        """Take a free slot (there must be one) and fill it with the known prefix of a prompt.

        `top` is what `fill` takes.

        The slot that shares most with the prompt is taken if at least half of its tokens are
        shared. Otherwise the slot is taken that shares least with the prompts next in line; of
        equal slots, the least recently used one.
        """
        free = [slot for slot in self._slots if slot.free]
        slot = max(free, key=lambda slot: slot.common(prompt))
        if 2 * slot.common(prompt) < len(slot.tokens):
            slot = min(free, key=lambda slot: (slot.common(*next_in_line), slot.released))
        slot.free = False
        known = prompt[:-1]
        longest = max(each.reusable(known, top) for each in self._slots)
        copy = self._cache.find(known, top, longest)
        self._cache.keep(slot, prompt)
        if copy is not None:
            self._cache.restore(copy, slot)
        self.fill(slot, prompt, top)
        return slot

    def fill(self, slot: CacheSlot, prompt: Sequence[int], top: int | None = None) -> None:
        """Make a slot hold exactly the longest prefix of a prompt that any slot holds.

        The prompt's last token is always computed, because its logits choose the next token. With
        `top`, so is what the logprobs of the prompt's tokens need.
        """
        known = prompt[:-1]
        source = max(self._slots, key=lambda each: (each.reusable(known, top), each is slot))
        length = source.reusable(known, top)
        if source is slot:
            self._engine.forget(length, slot.seq_id)
        else:
            self._engine.forget(0, slot.seq_id)
            self._engine.share(source.seq_id, slot.seq_id, length)
        # If the next token is scored already, the one before need not be computed for it.
        scored = length if top is not None else max(0, length - 1)
        slot.tokens, slot.scores = source.tokens[:length], source.scores[:scored]

    def release(self, slot: CacheSlot) -> None:
        """Make a slot free; its tokens stay until it is taken."""
        slot.free, slot.released = True, next(self._releases)

    def empty(self, slot: CacheSlot) -> None:
        """Drop a slot's tokens."""
        self._engine.forget(0, slot.seq_id)
        slot.cut(0)

    def forget(self) -> None:
        """Free all slots and drop their tokens."""
        self._engine.forget()
        for slot in self._slots:
            slot.cut(0)
            slot.free = True
