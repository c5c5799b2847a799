"""The engine's sequences: what each one holds in the KV cache, and which prefixes they share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from dots1_local.chat.kv_cache import common_prefix
from dots1_local.engine.engine import Engine

__all__ = ["CacheSlot", "Slots"]


@dataclass
class CacheSlot:
    """A sequence of the engine and the tokens in its KV cache, which a free slot keeps."""

    seq_id: int
    tokens: list[int] = field(default_factory=list)
    free: bool = True
    released: int = 0  # the higher the number, the later the release

    def common(self, *prompts: Sequence[int]) -> int:
        """Return the length of the longest prefix that the slot shares with one of the prompts."""
        return max((common_prefix(self.tokens, prompt) for prompt in prompts), default=0)


class Slots:
    """All sequences of an engine, at first empty."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._slots = [CacheSlot(seq_id) for seq_id in range(engine.params.n_sequences)]
        self._releases = count(1)
        self.forget()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def any_free(self) -> bool:
        """Whether a slot can be taken."""
        return any(slot.free for slot in self._slots)

    def take(self, prompt: Sequence[int], next_in_line: Sequence[Sequence[int]]) -> CacheSlot:
        """Take a free slot (there must be one) and fill it with the known prefix of a prompt.

        The slot that shares most with the prompt is taken if at least half of its tokens are
        shared. Otherwise the slot is taken that shares least with the prompts next in line; of
        equal slots, the least recently used one.
        """
        free = [slot for slot in self._slots if slot.free]
        slot = max(free, key=lambda slot: slot.common(prompt))
        if 2 * slot.common(prompt) < len(slot.tokens):
            slot = min(free, key=lambda slot: (slot.common(*next_in_line), slot.released))
        slot.free = False
        self.fill(slot, prompt)
        return slot

    def fill(self, slot: CacheSlot, prompt: Sequence[int]) -> None:
        """Make a slot hold exactly the longest prefix of a prompt that any slot holds.

        The prompt's last token is always computed, because its logits choose the next token.
        """
        known = prompt[:-1]
        source = max(self._slots, key=lambda each: (each.common(known), each is slot))
        length = source.common(known)
        if source is slot:
            self._engine.forget(length, slot.seq_id)
        else:
            self._engine.forget(0, slot.seq_id)
            self._engine.share(source.seq_id, slot.seq_id, length)
        slot.tokens = list(known[:length])

    def release(self, slot: CacheSlot) -> None:
        """Make a slot free; its tokens stay until it is taken."""
        slot.free, slot.released = True, next(self._releases)

    def empty(self, slot: CacheSlot) -> None:
        """Drop a slot's tokens."""
        self._engine.forget(0, slot.seq_id)
        slot.tokens = []

    def forget(self) -> None:
        """Free all slots and drop their tokens."""
        self._engine.forget()
        for slot in self._slots:
            slot.tokens, slot.free = [], True
