"""The engine's sequences: what each holds, and how much of a new prompt is computed already."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from dots1_local.chat.kv_cache import common_prefix
from dots1_local.engine.engine import Engine

__all__ = ["Slot", "Slots"]


@dataclass
class Slot:
    """A sequence of the engine and the tokens in its KV cache, which are kept when it is free."""

    number: int
    tokens: list[int] = field(default_factory=list)
    free: bool = True
    used: int = 0  # the higher, the later it was released

    def common(self, tokens: Sequence[int]) -> int:
        """How many tokens these and the slot's have in common at the beginning."""
        return common_prefix(self.tokens, tokens)


class Slots:
    """All sequences of an engine, at first empty."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._slots = [Slot(number) for number in range(engine.settings.n_sequences)]
        self._releases = count(1)
        self.forget()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def any_free(self) -> bool:
        """Whether one can be taken."""
        return any(slot.free for slot in self._slots)

    def take(self, prompt: Sequence[int], next_in_line: Sequence[Sequence[int]]) -> Slot:
        """Take a free sequence (there must be one) and fill it with what is known of a prompt.

        It is the one that shares most with the prompt, if that is half of what it holds or more.
        Otherwise it is the one that the prompts next in line have least use for, and of equals the
        least recently used.
        """
        free = [slot for slot in self._slots if slot.free]
        slot = max(free, key=lambda slot: slot.common(prompt))
        if 2 * slot.common(prompt) < len(slot.tokens):
            slot = min(free, key=lambda slot: (_use(slot, next_in_line), slot.used))
        slot.free = False
        self.fill(slot, prompt)
        return slot

    def fill(self, slot: Slot, prompt: Sequence[int]) -> None:
        """Make a sequence hold the longest prefix of a prompt that any sequence holds, and no more.

        The last token is left out: it is always computed, for the logits of the next one.
        """
        known = prompt[:-1]
        source = max(self._slots, key=lambda each: (each.common(known), each is slot))
        length = source.common(known)
        if source is slot:
            self._engine.forget(length, slot.number)
        else:
            self._engine.forget(0, slot.number)
            self._engine.share(source.number, slot.number, length)
        slot.tokens = list(known[:length])

    def release(self, slot: Slot) -> None:
        """Make it free; what it holds stays until it is taken."""
        slot.free, slot.used = True, next(self._releases)

    def empty(self, slot: Slot) -> None:
        """Drop what a sequence holds."""
        self._engine.forget(0, slot.number)
        slot.tokens = []

    def forget(self) -> None:
        """Free all sequences, and drop what they hold."""
        self._engine.forget()
        for slot in self._slots:
            slot.tokens, slot.free = [], True


def _use(slot: Slot, prompts: Sequence[Sequence[int]]) -> int:
    return max(map(slot.common, prompts), default=0)
