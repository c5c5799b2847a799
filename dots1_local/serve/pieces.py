"""Pieces of an answer: text that is certain, with the log-probabilities of its tokens."""

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dots1_local.chat.turns import AnswerText
from dots1_local.errors import Dots1Error
from dots1_local.serve.generation import Piece, TokenLogprob

__all__ = ["PieceBuilder", "check_finite", "token_logprob"]


class PieceBuilder:
    """Turns tokens into pieces of text with logprobs.

    A token's logprobs are sent with the first of its text, so they wait while that is held back.
    Tokens without text send theirs at the end. A token that begins at or after a stop string sends
    none. A token that a stop string begins inside sends its own, because part of it is text.
    """

    def __init__(self, index: int, stop: tuple[str, ...]) -> None:
        self._index = index
        self._text = AnswerText(stop)
        self._sent = 0  # characters
        self._held: deque[tuple[int, TokenLogprob]] = deque()  # and where their text begins

    @property
    def stopped(self) -> str | None:
        """The stop string that has ended the text, if any."""
        return self._text.stopped

    def add(self, token: int, piece: bytes, logprob: TokenLogprob | None) -> Piece | None:
        """Add a token; return the text and logprobs that are now certain, if any."""
        if logprob:
            self._held.append((self._text.length, logprob))
        return self._piece(self._text.add(token, piece))

    def finish(self) -> Piece | None:
        """Return what was held back, because no token follows."""
        return self._piece(self._text.finish(), ended=not self.stopped)

    def _piece(self, text: str, ended: bool = False) -> Piece | None:
        self._sent += len(text)
        end = self._text.length + 1 if ended else self._sent
        logprobs = []
        while self._held and self._held[0][0] < end:
            logprobs.append(self._held.popleft()[1])
        return Piece(self._index, text, tuple(logprobs)) if text or logprobs else None


def token_logprob(
    logits: NDArray[np.float32], token: int, top: int, piece: Callable[[int], bytes]
) -> TokenLogprob:
    """Return the log-softmax of logits (n_vocab,) at `token` and at the `top` likeliest tokens.

    The likeliest tokens are sorted, the likeliest first; `piece` returns a token's bytes.
    """
    maximum = logits.max()
    # Float32 is enough for each term, but not for a sum of 152,064 of them.
    total = np.log(np.exp(logits - maximum).sum(dtype=np.float64))
    ids = [token, *_likeliest(logits, top)]
    logprobs = np.minimum(0, logits[ids].astype(np.float64) - maximum - total).tolist()
    own, *best = [(each, piece(each), value) for each, value in zip(ids, logprobs, strict=True)]
    rank = 1 + int(np.count_nonzero(logits > logits[token]))
    return TokenLogprob(*own, top=tuple(best), rank=rank)


def check_finite(logits: NDArray[np.float32]) -> None:
    if not np.isfinite(logits.max()):
        raise Dots1Error("the model computes logits that are not finite; is its file damaged?")


def _likeliest(logits: NDArray[np.float32], count: int) -> list[int]:
    count = min(count, len(logits))
    if not count:
        return []
    chosen = np.argpartition(logits, len(logits) - count)[len(logits) - count :]
    # Of equal logits the lower id comes first, as in llama.cpp.
    order = np.lexsort((chosen, -logits[chosen]))
    found: list[int] = chosen[order].tolist()
    return found
