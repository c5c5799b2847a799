"""What restricts the tokens of an answer: a grammar, or a least length."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Constraint", "LateEnd", "TokenMatcher"]


class TokenMatcher(Protocol):
    """The state of one answer; its methods raise Dots1Error if the answer cannot go on."""

    def accept(self, token: int) -> bool:
        """Append a token to the answer; return False if the token is not allowed."""
        ...

    def mask(self) -> NDArray[np.bool_]:
        """Return which tokens (n_vocab,) may come next."""
        ...


class Constraint(Protocol):
    """What all answers of a kind must be; each answer needs a new `matcher()`."""

    def matcher(self) -> TokenMatcher:
        """Return the state of an answer that has no tokens yet."""
        ...


class LateEnd:
    """Answers that have at least `least` tokens before one that `ends` them; None: never end."""

    def __init__(self, least: int | None, ends: Callable[[int], bool], n_vocab: int) -> None:
        self.least, self.ends, self.n_vocab = least, ends, n_vocab

    def matcher(self) -> TokenMatcher:
        """Return the state of an answer that has no tokens yet."""
        return _LateEndMatcher(self)


class _LateEndMatcher:
    def __init__(self, rule: LateEnd) -> None:
        self._rule, self._length = rule, 0

    def accept(self, token: int) -> bool:
        if self._too_early and self._rule.ends(token):
            return False
        self._length += 1
        return True

    def mask(self) -> NDArray[np.bool_]:
        if not self._too_early:
            return np.ones(self._rule.n_vocab, np.bool_)
        return np.array([not self._rule.ends(token) for token in range(self._rule.n_vocab)])

    @property
    def _too_early(self) -> bool:
        return self._rule.least is None or self._length < self._rule.least
