"""Which tokens the engine has in its KV cache, so that only what is new is computed."""

from collections.abc import Sequence

from dots1_local.progress import Progress, silent
from dots1_local.runtime.engine import Engine

__all__ = ["KVCache"]


class KVCache:
    """The cache of an engine's one sequence.

    It never believes to hold more than it does: an interrupted call may leave more in the engine,
    which the next one drops.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tokens: list[int] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def hold(self, tokens: Sequence[int], progress: Progress = silent) -> int:
        """Make it hold exactly `tokens`, a ubatch at a time; how many of them it had already.

        The last one is always computed: its logits are what comes next.
        """
        common = _common_prefix(self._tokens, tokens[:-1])
        del self._tokens[common:]
        self._engine.forget(common)
        new = len(tokens) - common
        progress(0, new, "tokens", "reading")
        for start in range(common, len(tokens), self._engine.n_ubatch):
            self._append(tokens[start : start + self._engine.n_ubatch])
            progress(len(self._tokens) - common, new, "tokens", "reading")
        return common

    def add(self, token: int) -> None:
        """Compute one more token."""
        self._append([token])

    def _append(self, tokens: Sequence[int]) -> None:
        self._engine.decode(tokens, len(self._tokens))
        self._tokens += tokens


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
