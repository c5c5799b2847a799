"""KV caches of earlier prompts, for slots that were given to other prompts since.

Prompts are cut into blocks, and the blocks form a tree: prompts share those that they begin with. A
block is in RAM, on disk or in both. On disk they are saved as soon as an answer ends, and outlast
the server; without a disk they are copied when their slot is given away.
"""

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from dots1_local.chat.kv_cache import common_prefix
from dots1_local.engine.engine import Engine
from dots1_local.serve.cache_slot import CacheSlot
from dots1_local.serve.disk_cache import DiskCache
from dots1_local.serve.kv_block import BLOCK_TOKENS, Block

__all__ = ["PromptCache", "Restoration"]

_WORTH = 32  # tokens; computing fewer is as fast as copying them
_AHEAD = 3  # blocks that are read while one is restored
_PATIENCE = 1.0  # seconds of an idle engine for the disk, before it looks for other work
_GIVE_UP = 20.0  # seconds for a block; a disk that is so slow, or gone, is not worth waiting for


class PromptCache:
    """Blocks of earlier prompts: up to `ram_bytes` in RAM, and those on `disk`."""

    def __init__(self, engine: Engine, ram_bytes: int, disk: DiskCache | None = None) -> None:
        self._engine, self.ram_bytes, self._disk = engine, ram_bytes, disk
        self._root = disk.root if disk else ""
        self._children: defaultdict[str, list[Block]] = defaultdict(list)  # by their parent's key
        self._in_ram: dict[str, Block] = {}  # the last one was used last
        self._unwritten: deque[Block] = deque()  # in RAM, but not on disk
        self._unsaved: deque[CacheSlot] = deque()  # free slots with tokens that are not on disk
        self.ram_used = 0  # bytes
        self.restored_tokens = 0
        for block in disk.blocks() if disk else ():
            self._children[block.parent].append(block)

    @property
    def disk_used(self) -> int:
        """The bytes on disk."""
        return self._disk.nbytes if self._disk else 0

    @property
    def unsaved(self) -> bool:
        """Whether the disk lacks something that `save` would write."""
        return bool(self._unwritten or self._unsaved)

    def note(self, slot: CacheSlot) -> None:
        """Let `save` write what a slot holds that is free now."""
        if self._disk and slot not in self._unsaved:
            self._unsaved.append(slot)

    def keep(self, slot: CacheSlot, prompt: Sequence[int]) -> None:
        """Copy what a slot holds that is given to a prompt, if it loses much."""
        if len(slot.tokens) - slot.common(prompt) >= _WORTH:
            while self._copy_next(slot):
                pass
        if slot in self._unsaved:
            self._unsaved.remove(slot)

    def save(self, *, wait: bool) -> None:
        """Hand a block to the disk, if there is one to write and the disk is ready.

        With `wait`, wait a second for the disk.
        """
        if self._disk is None or not self.unsaved:
            return
        if not self._disk.wait_for_room(_PATIENCE if wait else 0):
            if self._disk.failing:
                self._unwritten.clear()
                self._unsaved.clear()
            return
        while self._unwritten:
            block = self._unwritten.popleft()
            if block.state is not None and not block.on_disk:
                self._disk.write(block, block.state)
                return
        while self._unsaved and not self._copy_next(self._unsaved[0]):
            self._unsaved.popleft()

    def find(self, prompt: Sequence[int], top: int | None, known: int) -> tuple[list[Block], int]:
        """Return blocks that have more of a prompt's tokens than the `known` ones, and how many.

        With `top`, tokens whose logprobs are not known do not count. The blocks count as used.
        """
        path, _ = self._walk(prompt)
        slot = CacheSlot(-1)
        for block in path:
            append(slot, block)
        length = slot.reusable(prompt, top)
        if length < known + _WORTH:
            return [], 0
        self._use(path)
        return path, length

    def restore(self, slot: CacheSlot, path: Sequence[Block], length: int) -> "Restoration":
        """Begin to restore the tokens of `path` that a slot lacks, `length` of which it needs."""
        blocks = path[len(slot.tokens) // BLOCK_TOKENS : -(-length // BLOCK_TOKENS)]
        return Restoration(self, self._engine, slot, blocks)

    def load(self, block: Block) -> Future[NDArray[np.uint8] | None]:
        """Return the state of a block, perhaps from the disk; None if that fails."""
        if block.state is None and self._disk:
            return self._disk.read(block)
        loaded: Future[NDArray[np.uint8] | None] = Future()
        loaded.set_result(block.state)
        return loaded

    def restored(self, block: Block, state: NDArray[np.uint8], path: Sequence[Block]) -> None:
        """Count a block as restored, and keep it in RAM if there is room beside its `path`."""
        self.restored_tokens += len(block.tokens)
        if block.state is None:
            self._put_in_ram(block, state, path)

    def close(self) -> None:
        """Write what the disk has been given."""
        if self._disk:
            self._disk.close()

    def _walk(self, tokens: Sequence[int]) -> tuple[list[Block], int]:
        """Return the blocks that tokens begin with, and how many tokens they have in common.

        Only the last block may have other tokens too.
        """
        path: list[Block] = []
        key, length = self._root, 0
        while children := [each for each in self._children.get(key, ()) if each.available]:
            rest = tokens[length : length + BLOCK_TOKENS]
            common, best = max(
                ((common_prefix(each.tokens, rest), each) for each in children),
                key=lambda pair: pair[0],
            )
            if not common:
                break
            path.append(best)
            length += common
            if common < BLOCK_TOKENS:
                break
            key = best.key
        return path, length

    def _copy_next(self, slot: CacheSlot) -> bool:
        """Copy the next block of a slot; return False if there is none or no room for it."""
        path, length = self._walk(slot.tokens)
        if len(slot.tokens) - length < _WORTH:
            return False
        number = length // BLOCK_TOKENS
        before = path[:number]
        start = number * BLOCK_TOKENS
        tokens = tuple(slot.tokens[start : start + BLOCK_TOKENS])
        scores = tuple(slot.scores[max(0, start - 1) : start + len(tokens) - 1])
        block = Block(before[-1].key if before else self._root, start, tokens, scores)
        state = self._engine.copy(slot.seq_id, block.start, block.end)
        if state is None:
            return False
        self._put_in_ram(block, state, before)
        if self._disk and self._disk.wait_for_room(0):
            self._disk.write(block, state)
        elif block.state is None:
            return False
        elif self._disk:
            self._unwritten.append(block)
        self._add(block)
        self._use([*before, block])
        return True

    def _add(self, block: Block) -> None:
        """Add a block to the tree in place of its own beginnings."""
        siblings = self._children[block.parent]
        for each in siblings:
            if common_prefix(each.tokens, block.tokens) == len(each.tokens):
                self._drop_from_ram(each)
                if self._disk and each.on_disk and each.key != block.key:
                    self._disk.remove(each)
        siblings[:] = [*(each for each in siblings if each.available), block]

    def _use(self, path: Sequence[Block]) -> None:
        """Count blocks as used now, the first one last."""
        for block in reversed(path):
            if block.key in self._in_ram:
                self._in_ram[block.key] = self._in_ram.pop(block.key)
        if self._disk:
            self._disk.touch(path)

    def _put_in_ram(self, block: Block, state: NDArray[np.uint8], path: Iterable[Block]) -> None:
        """Keep a block in RAM if there is room for it beside the other blocks of its path."""
        kept = {each.key for each in path}
        while self.ram_used + state.nbytes > self.ram_bytes:
            oldest = next((each for key, each in self._in_ram.items() if key not in kept), None)
            if oldest is None:
                return
            self._drop_from_ram(oldest)
        block.state = state
        self._in_ram[block.key] = block
        self.ram_used += state.nbytes

    def _drop_from_ram(self, block: Block) -> None:
        if self._in_ram.pop(block.key, None) and block.state is not None:
            self.ram_used -= block.state.nbytes
        block.state = None


class Restoration:
    """Blocks on their way into a slot."""

    def __init__(
        self, cache: PromptCache, engine: Engine, slot: CacheSlot, blocks: Sequence[Block]
    ) -> None:
        self._cache, self._engine, self._slot, self._blocks = cache, engine, slot, blocks
        self._loads = [cache.load(block) for block in blocks[:_AHEAD]]
        self._done, self._progress = 0, time.monotonic()  # blocks, and when there was one more
        slot.cut(blocks[0].start)
        engine.forget(blocks[0].start, slot.seq_id)

    def step(self, *, wait: bool) -> bool:
        """Restore a block if it is loaded; return whether that was the last one.

        If a block cannot be restored, it is the last one. With `wait`, wait a second for it.
        """
        load = self._loads[self._done]
        try:
            state = load.result(_PATIENCE if wait else 0)
        except TimeoutError:
            return time.monotonic() > self._progress + _GIVE_UP
        block = self._blocks[self._done]
        self._loads[self._done] = Future()  # the state may be large
        if state is None or not self._engine.paste(
            state, self._slot.seq_id, block.start, block.end
        ):
            return True
        append(self._slot, block)
        self._cache.restored(block, state, self._blocks)
        self._done, self._progress = self._done + 1, time.monotonic()
        self._loads += map(self._cache.load, self._blocks[len(self._loads) :][:1])
        return self._done == len(self._blocks)


def append(slot: CacheSlot, block: Block) -> None:
    """Append a block's tokens to those of a slot, and the logprobs if there is no gap."""
    if len(slot.scores) == max(0, block.start - 1):
        slot.scores += block.scores
    slot.tokens += block.tokens
