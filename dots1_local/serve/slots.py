"""The engine's sequences: what each one holds in the KV cache, and which prefixes they share."""

from collections.abc import Iterator, Sequence
from itertools import count

from dots1_local.engine.engine import Engine
from dots1_local.serve.cache_slot import CacheSlot
from dots1_local.serve.prompt_cache import PromptCache, Restoration

__all__ = ["Slots"]


class Slots:
    """All sequences of an engine, at first empty; what they held before stays in the `cache`."""

    def __init__(self, engine: Engine, cache: PromptCache) -> None:
        self._engine, self._cache = engine, cache
        self._slots = [CacheSlot(seq_id) for seq_id in range(engine.params.n_sequences)]
        self._restorations: dict[CacheSlot, Restoration] = {}
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
        *,
        reuse: bool = True,
    ) -> CacheSlot:
        """Take a free slot (there must be one) and fill it with the known prefix of a prompt.

        If the prompt cache has more of the prompt, the slot must be restored. Without `reuse`, the
        slot is empty.

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
        if not reuse:
            self._cache.keep(slot, ())
            self.empty(slot)
            return slot
        known = prompt[:-1]
        longest = max(each.reusable(known, top) for each in self._slots)
        path, slot.restoring = self._cache.find(known, top, longest)
        self._cache.keep(slot, prompt)
        self.fill(slot, prompt, top)
        if path:
            self._restorations[slot] = self._cache.restore(slot, path, slot.restoring)
        return slot

    def restore(
        self, slot: CacheSlot, prompt: Sequence[int], top: int | None = None, *, wait: bool
    ) -> None:
        """Restore a part of what the prompt cache has of a slot's prompt.

        Without `wait`, restore nothing if the part is not loaded from the disk yet.
        """
        if self._restorations[slot].step(wait=wait):
            self._end_restoration(slot)
            self.fill(slot, prompt, top)

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
        self._end_restoration(slot)
        slot.free, slot.released = True, next(self._releases)
        self._cache.note(slot)

    @property
    def unsaved(self) -> bool:
        """Whether the prompt cache's disk lacks something that `save` would write."""
        return self._cache.unsaved

    def save(self, *, wait: bool) -> None:
        """Let the prompt cache write a part of what its disk lacks; with `wait`, wait for it."""
        self._cache.save(wait=wait)

    def empty(self, slot: CacheSlot) -> None:
        """Drop a slot's tokens."""
        self._engine.forget(0, slot.seq_id)
        slot.cut(0)

    def forget(self) -> None:
        """Free all slots and drop their tokens."""
        self._engine.forget()
        for slot in self._slots:
            self._end_restoration(slot)
            slot.cut(0)
            slot.free = True

    def close(self) -> None:
        """Drop all tokens, and finish writing what the prompt cache has begun."""
        self.forget()
        self._cache.close()

    def _end_restoration(self, slot: CacheSlot) -> None:
        self._restorations.pop(slot, None)
        slot.restoring = 0
