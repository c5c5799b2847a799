"""Drafts without a draft model: what followed the last tokens where the text had them before.

This is prompt lookup decoding (Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding). The
engine computes the last token and a draft of what may follow it in one ubatch, and the draft's
tokens are right for as long as the sampler chooses the same. So drafts change how long an answer
takes, and the text only as far as ubatches of other sizes round differently.

In a mixture of experts each token of a draft reads further experts: a ubatch takes as long as
several tokens one by one, and a draft pays only if it is long and right. So a draft needs a long
match, and `DraftPolicy` compares the seconds that steps with and without a draft took.
"""

from array import array
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Literal, Self

from dots1_local.engine.engine import Engine
from dots1_local.errors import UsageError
from dots1_local.placement.graph_memory import LLAMA_MIN_BATCH

__all__ = ["MATCH", "Draft", "DraftPolicy", "Drafter", "NgramIndex", "longest_draft"]

Draft = Literal["auto"] | int  # how many tokens a draft may have; 0 is no drafts

MATCH = 12  # tokens that must have been there before
_MAX_DRAFT = 255  # tokens
_STEPS = 15  # the last steps without a draft, the median of which counts
_DRAFTS = 4  # the last drafts, which must have paid together
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 1024  # tokens without a draft after drafts that did not pay


def longest_draft(draft: Draft) -> int:
    """Return the tokens of the longest draft; "auto" stays below the ubatches that copy weights.

    llama.cpp copies weights from RAM to a GPU for ubatches of 32 tokens or more.

    Raises:
        UsageError: the number is out of range.
    """
    longest = LLAMA_MIN_BATCH - 2 if draft == "auto" else draft
    if not 0 <= longest <= _MAX_DRAFT:
        raise UsageError(f"a draft of {longest} tokens is not possible; choose 1 to {_MAX_DRAFT}")
    return longest


class NgramIndex:
    """A growing text, and where each of its n-grams of `MATCH` tokens was last.

    It takes about 160 bytes for each token of the text, of which it has as many as the context.
    """

    def __init__(self) -> None:
        self._text = array("i")
        self._next: dict[bytes, int] = {}  # by n-gram the place after its last occurrence

    def __len__(self) -> int:
        return len(self._text)

    def begin(self, tokens: Sequence[int]) -> None:
        """Make the text `tokens`; the index is kept if the text was their beginning."""
        count = len(self._text)
        if self._text != array("i", tokens[:count]):
            count = 0
            self._text, self._next = array("i"), {}
        self.extend(tokens[count:])

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        text, width = self._text, self._text.itemsize
        first = max(len(text), MATCH)
        text.extend(tokens)
        data = text[first - MATCH :].tobytes()
        for place in range(first, len(text)):
            start = (place - first) * width
            self._next[data[start : start + MATCH * width]] = place

    def draft(self, limit: int) -> list[int]:
        """Return up to `limit` tokens that followed the last n-gram where it was before.

        Where they reach the end of the text, they go on as a text would that repeats itself.
        """
        text = self._text
        place = self._next.get(text[-MATCH:].tobytes())
        if place is None:
            return []
        period = len(text) - place
        return [text[place + i % period] for i in range(limit)]


class DraftPolicy:
    """How many tokens the next draft may have, for all texts of an engine.

    A number is used as it is. With "auto", drafts have half of the longest length until one was
    right as a whole, and none is made while they do not pay: if the last drafts took longer than
    their right tokens would have taken one by one, there is a pause. Each further pause is twice as
    long, until drafts pay.
    """

    def __init__(self, longest: int, *, auto: bool) -> None:
        self._longest, self._auto = longest, auto
        self._single: deque[float] = deque(maxlen=_STEPS)  # seconds of a step without a draft
        self._drafts: deque[tuple[float, int]] = deque(maxlen=_DRAFTS)  # seconds, tokens gained
        self._right = False  # whether the last draft was, as a whole
        self._pause, self._paused = _FIRST_PAUSE, 0

    @classmethod
    def choose(cls, draft: Draft, engine: Engine) -> Self:
        """Make the policy that an engine has room for."""
        longest, auto = min(longest_draft(draft), engine.params.n_outputs - 1), draft == "auto"
        placement = engine.placement
        if auto and placement and placement.offload_min_batch:
            longest = min(longest, placement.offload_min_batch - 2)
        return cls(min(longest, engine.params.n_draft), auto=auto)

    @property
    def enabled(self) -> bool:
        """Whether there may ever be a draft."""
        return self._longest > 0

    @property
    def length(self) -> int:
        """The most tokens that the next draft may have."""
        if not self._auto:
            return self._longest
        if self._paused or len(self._single) < _DRAFTS:
            return 0
        return self._longest if self._right else self._longest // 2

    def record(self, seconds: float, drafted: int, accepted: int) -> None:
        """Record a step of one token and a draft of `drafted`, of which `accepted` were right."""
        if not drafted:
            self._single.append(seconds)
            self._paused = max(0, self._paused - 1)
            return
        self._right = accepted == drafted
        self._drafts.append((seconds, 1 + accepted))
        taken, gained = map(sum, zip(*self._drafts, strict=True))
        if self._single and taken > gained * median(self._single):
            self._paused, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
            self._drafts.clear()
        else:
            self._pause = _FIRST_PAUSE


class Drafter:
    """Drafts for one text, and how many of their tokens were right.

    `begin` says which text an answer follows. In each step `propose` returns a draft, `computed`
    says how long the ubatch took, and `accept` takes each token that the sampler chooses.
    """

    def __init__(self, policy: DraftPolicy) -> None:
        self._policy, self._index = policy, NgramIndex()
        self._left: list[int] = []  # of the draft, what the sampler may still choose
        self._step = (0, 0)  # tokens of the draft, and those that the sampler chose
        self._seconds: float | None = None  # of the step, until it is recorded
        self._proposed = False
        self.drafted = self.accepted = 0  # tokens of the answer's drafts

    @property
    def begun(self) -> bool:
        """Whether `begin` was called."""
        return len(self._index) > 0

    def begin(self, text: Sequence[int]) -> None:
        """Let drafts follow a text, and count them anew."""
        self.drafted = self.accepted = 0
        if self._policy.enabled:
            self._index.begin(text)

    def propose(self, limit: int) -> list[int]:
        """Return up to `limit` tokens that may follow the text, mostly none."""
        self.end()
        length = min(limit, self._policy.length)
        self._left = self._index.draft(length) if length > 0 else []
        self._step, self._proposed = (len(self._left), 0), True
        self.drafted += len(self._left)
        return list(self._left)

    def computed(self, seconds: float) -> None:
        """Note how long the step took for which a draft was proposed; ignore other steps."""
        if self._proposed:
            self._seconds, self._proposed = seconds, False

    def accept(self, token: int) -> bool:
        """Append a token to the text; return whether it was next in the draft, so is computed."""
        if self.begun:
            self._index.extend([token])
        if self._left[:1] != [token]:
            self._left = []
            return False
        del self._left[0]
        drafted, right = self._step
        self._step = drafted, right + 1
        self.accepted += 1
        return True

    def end(self) -> None:
        """End the step, of whose draft no further token is right."""
        if self._seconds is not None:
            self._policy.record(self._seconds, *self._step)
            self._seconds = None
        self._left = []
