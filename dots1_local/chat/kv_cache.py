"""The tokens in the engine's KV cache, so that only new ones are computed."""

from collections.abc import Sequence
from itertools import compress, count
from operator import ne
from pathlib import Path

from dots1_local.chat.kv_state import AnswerTokens, KVState, restore_state, save_state
from dots1_local.engine.engine import Engine
from dots1_local.progress import Progress, silent

__all__ = ["KVCache"]


class KVCache:
    """The cache of an engine's only sequence.

    If a call is interrupted, the engine may hold more tokens than are counted here; the next call
    drops them. `row` is the place in the last ubatch of the logits after all tokens.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tokens: list[int] = []
        self._drafted = 0  # tokens that the engine holds beyond these
        self.row = -1
        self._saved: tuple[Path, list[int]] | None = None

    def __len__(self) -> int:
        return len(self._tokens)

    def hold(self, tokens: Sequence[int], progress: Progress = silent) -> int:
        """Make the cache hold exactly `tokens`; return how many of them it had already.

        The last token is always computed, for the logits of the next one.
        """
        common = self.keep(tokens[:-1])
        new = len(tokens) - common
        progress(0, new, "tokens", "reading")
        for start in range(common, len(tokens), self._engine.n_ubatch):
            self.append(tokens[start : start + self._engine.n_ubatch])
            progress(len(self._tokens) - common, new, "tokens", "reading")
        return common

    def append(self, tokens: Sequence[int], draft: Sequence[int] = ()) -> None:
        """Compute up to a ubatch of further tokens, and of a draft that may follow them."""
        self.drop_draft()
        self._drafted = len(draft)
        self._engine.decode([*tokens, *draft], len(self._tokens), drafted=len(draft))
        self._tokens += tokens
        self.row = len(tokens) - 1

    def accept(self, token: int) -> None:
        """Count the next token of the draft."""
        self._tokens.append(token)
        self._drafted -= 1
        self.row += 1

    def drop_draft(self) -> None:
        """Drop what is left of the draft."""
        if self._drafted:
            self._engine.forget(len(self._tokens))
            self._drafted = 0

    def keep(self, tokens: Sequence[int]) -> int:
        """Drop all but the common prefix with `tokens`; return its length."""
        common = common_prefix(self._tokens, tokens)
        del self._tokens[common:]
        self._engine.forget(common)
        self._drafted = 0
        return common

    def save(self, path: Path, answers: AnswerTokens = (), progress: Progress = silent) -> int:
        """Write the cache as `save_state` does, unless the file has the same tokens already."""
        nothing_new = self._saved == (path.absolute(), self._tokens) and path.exists()
        if not self._tokens or nothing_new:
            return 0
        nbytes = save_state(path, self._engine, self._tokens, answers, progress)
        self._saved = (path.absolute(), list(self._tokens))
        return nbytes

    def restore(self, path: Path, state: KVState) -> None:
        """Load `state`, which was opened from `path`; if that fails, the cache is empty."""
        self._tokens = []
        if restore_state(state, self._engine):
            self._tokens = list(state.tokens)
            self._saved = (path.absolute(), state.tokens)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    differing = compress(count(), map(ne, left, right))  # no Python loop: they may be long
    return next(differing, min(len(left), len(right)))
