"""The engine's sequences: what each holds, and what a new prompt finds there already computed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from dots1_local.runtime.chat.kv_cache import common_prefix
from dots1_local.runtime.engine import Engine

__all__ = ["Slot", "Slots"]


@dataclass
class Slot:
    """A sequence of the engine and the tokens in its cache, which stay there when it is free."""

    number: int
    tokens: list[int] = field(default_factory=list)
    free: bool = True
    used: int = 0  # the higher, the later it was released

    def common(self, tokens: Sequence[int]) -> int:
        """How many tokens it holds of those that these begin with."""
        return common_prefix(self.tokens, tokens)


class Slots:
    """All sequences of an engine; they begin empty."""

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
        """A free sequence, there must be one, that then holds what is known of a prompt.

        What the prompt goes on from is gone on with. For anything else the free sequence goes that
        the prompts next in line have least use for, and of equals the one not used for longest.
        """
        free = [slot for slot in self._slots if slot.free]
        slot = max(free, key=lambda slot: slot.common(prompt))
        if 2 * slot.common(prompt) < len(slot.tokens):
            slot = min(free, key=lambda slot: (_use(slot, next_in_line), slot.used))
        slot.free = False
        self.fill(slot, prompt)
        return slot

    def fill(self, slot: Slot, prompt: Sequence[int]) -> None:
        """Let a sequence hold what any of them holds of a prompt, and nothing else.

        The last token is left out: it is computed always, for the logits of what comes next.
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
        """Let others take it; what it holds stays until one does."""
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
