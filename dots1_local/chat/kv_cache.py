"""Which tokens the engine has in its KV cache, so that only what is new is computed."""

from collections.abc import Sequence
from itertools import compress, count
from operator import ne
from pathlib import Path

from dots1_local.chat.kv_state import AnswerTokens, KVState, restore_state, save_state
from dots1_local.engine.engine import Engine
from dots1_local.progress import Progress, silent

__all__ = ["KVCache"]


class KVCache:
    """The cache of an engine's one sequence.

    It never believes to hold more than it does: an interrupted call may leave more in the engine,
    which the next one drops.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tokens: list[int] = []
        self._saved: tuple[Path, list[int]] | None = None

    def __len__(self) -> int:
        return len(self._tokens)

    def hold(self, tokens: Sequence[int], progress: Progress = silent) -> int:
        """Make it hold exactly `tokens`, a ubatch at a time; how many of them it had already.

        The last one is always computed: its logits are what comes next.
        """
        common = self.keep(tokens[:-1])
        new = len(tokens) - common
        progress(0, new, "tokens", "reading")
        for start in range(common, len(tokens), self._engine.n_ubatch):
            self._append(tokens[start : start + self._engine.n_ubatch])
            progress(len(self._tokens) - common, new, "tokens", "reading")
        return common

    def add(self, token: int) -> None:
        """Compute one more token."""
        self._append([token])

    def keep(self, tokens: Sequence[int]) -> int:
        """Drop all but the beginning that it has in common with `tokens`; its length."""
        common = common_prefix(self._tokens, tokens)
        del self._tokens[common:]
        self._engine.forget(common)
        return common

    def save(self, path: Path, answers: AnswerTokens = (), progress: Progress = silent) -> int:
        """Write what it holds to a file; the bytes written, 0 where there is nothing to write.

        Raises:
            Dots1Error: it cannot be written there.
        """
        nothing_new = self._saved == (path.absolute(), self._tokens) and path.exists()
        if not self._tokens or nothing_new:
            return 0
        nbytes = save_state(path, self._engine, self._tokens, answers, progress)
        self._saved = (path.absolute(), list(self._tokens))
        return nbytes

    def restore(self, path: Path, state: KVState) -> None:
        """Hold what a file holds, of which `state` was opened; nothing if that fails."""
        self._tokens = []
        if restore_state(state, self._engine):
            self._tokens = list(state.tokens)
            self._saved = (path.absolute(), state.tokens)

    def _append(self, tokens: Sequence[int]) -> None:
        self._engine.decode(tokens, len(self._tokens))
        self._tokens += tokens


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens they begin with alike."""
    differing = compress(count(), map(ne, left, right))  # no Python loop: they may be long
    return next(differing, min(len(left), len(right)))
