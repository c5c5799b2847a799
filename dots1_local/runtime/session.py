"""One conversation with a model: turns in, streamed answers out."""

import codecs
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, Self

from dots1_local.errors import Dots1Error
from dots1_local.runtime.engine import Engine
from dots1_local.runtime.prompt import Message, Prompter
from dots1_local.runtime.sampling import Sampler, Sampling

__all__ = ["SYSTEM_PROMPT", "Session", "Stats"]

# With an empty system prompt the model is reported to drift off topic; this is what others use.
SYSTEM_PROMPT = "You are a helpful assistant."


@dataclass(frozen=True)
class Stats:
    """How the last answer went; `reused_tokens` of the prompt were still in the KV cache."""

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    prompt_seconds: float
    generation_seconds: float
    stop: Literal["end", "length", "context", "interrupted"]

    @property
    def prompt_speed(self) -> float:
        """Tokens a second over what had to be computed."""
        return (self.prompt_tokens - self.reused_tokens) / max(self.prompt_seconds, 1e-9)

    @property
    def generation_speed(self) -> float:
        """Tokens a second."""
        return self.generated_tokens / max(self.generation_seconds, 1e-9)


class Session:
    """A conversation on one engine; use it in a `with` statement.

    The KV cache keeps what turns have in common: only what is new is computed.
    """

    def __init__(
        self, engine: Engine, system: str = SYSTEM_PROMPT, sampling: Sampling | None = None
    ) -> None:
        self._engine = engine
        self._prompter = Prompter(engine)
        self._sampler = Sampler(sampling or Sampling())
        self._cached: list[int] = []
        self.messages: list[Message] = [Message("system", system)] if system else []
        self.stats: Stats | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._sampler.__exit__(*exception)

    def ask(self, text: str, max_tokens: int | None = None) -> Generator[str, None, None]:
        """Say `text` and stream the answer, whole characters at a time.

        The turn becomes part of the conversation when the answer ends, also where it is cut off by
        `max_tokens`, the context, or the caller closing the stream. `stats` tells which.

        Raises:
            Dots1Error: the conversation no longer fits into the context.
        """
        asked = [*self.messages, Message("user", text)]
        prompt = self._prompter.tokens(asked)
        room = self._engine.n_ctx - len(prompt)
        if room < 1:
            raise Dots1Error(
                f"the conversation is {len(prompt)} tokens long and the context holds "
                f"{self._engine.n_ctx}; choose a larger one with --context"
            )
        return self._answer(asked, prompt, min(room, max_tokens or room), max_tokens)

    def _answer(
        self, asked: list[Message], prompt: list[int], limit: int, max_tokens: int | None
    ) -> Generator[str, None, None]:
        start = time.perf_counter()
        reused = self._process(prompt)
        begun = time.perf_counter()
        stop: Literal["end", "length", "context", "interrupted"] = "interrupted"
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        written: list[int] = []
        said: list[str] = []
        try:
            while True:
                token = self._sampler.next(self._engine)
                if self._engine.is_end(token):
                    stop = "end"
                    break
                written.append(token)
                if said_now := decoder.decode(self._engine.piece(token)):
                    said.append(said_now)
                    yield said_now
                if len(written) == limit:
                    stop = "length" if limit == max_tokens else "context"
                    break
                self._append([token])
        finally:
            answer = Message("assistant", "".join(said), tuple(written))
            self.messages = [*asked, answer]
            self.stats = Stats(
                len(prompt), reused, len(written), begun - start, time.perf_counter() - begun, stop
            )

    def _process(self, prompt: list[int]) -> int:
        """Bring the KV cache to hold `prompt`; how many tokens of it were there already."""
        # The last token is always computed: its logits are what the answer begins with.
        common = _common_prefix(self._cached, prompt[:-1])
        # An interrupted call may have left more in the cache than `_cached` says.
        self._engine.forget(common)
        del self._cached[common:]
        self._append(prompt[common:])
        return common

    def _append(self, tokens: list[int]) -> None:
        for start in range(0, len(tokens), self._engine.n_ubatch):
            part = tokens[start : start + self._engine.n_ubatch]
            self._engine.decode(part, len(self._cached))
            self._cached += part


def _common_prefix(left: list[int], right: list[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
