"""One conversation with a model on a server, as a `Session` is one with an engine here."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Self

from dots1_local.chat.dialogue import Dialogue, Overflow
from dots1_local.chat.message import Message
from dots1_local.chat.remote.address import key_from
from dots1_local.chat.remote.parameters import GROUPS, prompt_of, sampling_of
from dots1_local.chat.remote.refusals import Refusal
from dots1_local.chat.remote.reply import Reply
from dots1_local.chat.remote.room import Room
from dots1_local.chat.remote.server import Server
from dots1_local.chat.sampling import Sampling
from dots1_local.chat.turns import Turn, blame, check_stop, count_turns, drop_oldest
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.progress import Progress

__all__ = ["RemoteSession"]

_USUAL_CONTEXT = 2048  # tokens, where the server does not say


@dataclass
class _RemoteTurn(Turn):
    """A turn that a server answers; `ceiling` is what the context leaves it, if known."""

    answer: Reply
    ceiling: int | None = field(default=None, kw_only=True)


class RemoteSession(Dialogue):
    """A conversation with a server's model; use it in a `with` statement.

    Figures that the server does not give are None. An answer that breaks off stays in the
    conversation as far as it came.
    """

    def __init__(
        self,
        server: Server,
        system: str | None = None,
        sampling: Sampling | None = None,
        *,
        raw: bool = False,
        overflow: Overflow = "drop",
        stop: tuple[str, ...] = (),
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(
            system, sampling, raw=raw, overflow=overflow, stop=stop, max_tokens=max_tokens
        )
        self._server = server
        self._room = Room()
        self._last: tuple[list[Message], int] | None = None  # a conversation and its tokens

    @classmethod
    def open(
        cls,
        url: str,
        model: str | None = None,
        *,
        tell: Callable[[str], None] = lambda sentence: None,
        **options: Any,
    ) -> Self:
        """A conversation with the server at `url`; of several models, `model` says which.

        A key is taken from the environment: DOTS1_API_KEY, or else OPENAI_API_KEY. `tell` hears
        what `Server` tells, and `options` are those of the class.

        Raises:
            UsageError: the address is none, or one of several models is to be named.
            Dots1Error: there is no such server there.
        """
        return cls(Server.open(url, model, key_from(), tell), **options)

    @property
    def model(self) -> str:
        """What the server calls it."""
        return self._server.model

    @property
    def title(self) -> str:
        """The model, and the server's address."""
        return f"{self.model} at {self._server.address.url}"

    @property
    def n_ctx(self) -> int | None:
        """Tokens the context holds; None until the server says."""
        return self._server.n_ctx

    @property
    def context_used(self) -> int | None:
        """Tokens of the conversation, as the server counted them after the last answer."""
        known = self._last is not None and self._last[0] is self.messages
        return self._last[1] if self._last and known else None

    def count(self, text: str) -> None:
        """None: only the server could count, and there is no common way to ask."""

    def _answer(
        self, asked: list[Message], limit: int | None, progress: Progress
    ) -> Generator[str, None, None]:
        check_stop(self.stop)
        if self.raw and not any(message.text for message in asked):
            raise UsageError("there is nothing to complete; give the beginning of a text")
        turn = _RemoteTurn(asked, limit, progress, Reply())
        return self._streamed(turn, self._received(turn))

    def _received(self, turn: _RemoteTurn) -> Generator[str, None, None]:
        reply = turn.answer
        try:
            with closing(self._chunks(turn)) as chunks:
                for chunk in chunks:
                    yield reply.take(chunk)
            if not reply.finished:
                raise Dots1Error(f"{self._server.address.url} stopped in the middle of the answer")
        finally:
            if reply.begun:
                self._join(turn)

    def _join(self, turn: _RemoteTurn) -> None:
        """Make it part of the conversation."""
        self.messages = [*turn.messages, turn.answer.message()]
        self.stats = stats = turn.answer.stats(turn.limit, self.n_ctx, turn.dropped)
        if stats.prompt_tokens is not None:
            self._room.learn(turn.messages, stats.prompt_tokens)
            self._last = self.messages, stats.prompt_tokens + stats.generated_tokens

    def _chunks(self, turn: _RemoteTurn) -> Generator[dict[str, Any], None, None]:
        """What the server streams, once the conversation fits into its context."""
        if self.overflow == "drop":
            self._drop(turn, self._room.to_drop(turn.messages, self.n_ctx, turn.limit))
        while True:
            path, prompt = prompt_of(turn.messages, raw=self.raw)
            body = {**prompt, **sampling_of(self.sampling), **self._bounds(turn)}
            try:
                yield from self._server.stream(path, body, lambda: _wait(turn), GROUPS)
                return
            except Refusal as refusal:
                if turn.answer.begun or not self._adapt(turn, refusal):
                    raise

    def _bounds(self, turn: _RemoteTurn) -> dict[str, Any]:
        """The parameters for the answer's length, stop strings and streaming."""
        most = min(filter(None, (turn.limit, turn.ceiling)), default=None)
        if most is None and self.raw:
            most = self.n_ctx  # unless told, text completions end after OpenAI's 16 tokens
        bounds: dict[str, Any] = {"max_tokens": most} if most or self.raw else {}
        if self.stop:
            bounds["stop"] = list(self.stop)
        return {**bounds, "stream": True, "stream_options": {"include_usage": True}}

    def _adapt(self, turn: _RemoteTurn, refusal: Refusal) -> bool:
        """Ask for a shorter answer or drop turns; False if that would not help.

        Raises:
            Dots1Error: the context does not hold the conversation, and no turn may be dropped.
        """
        too_long = refusal.too_long
        prompt = too_long.prompt if too_long else None
        if too_long and too_long.n_ctx:
            self._server.n_ctx = too_long.n_ctx
        if self._lower(turn, refusal, prompt):
            return True
        if too_long is None:
            return False
        if self.overflow == "stop" or count_turns(turn.messages) < 2:
            raise Dots1Error(self._overflowing(turn, prompt, refusal.said)) from refusal
        if prompt is not None:
            self._room.learn(turn.messages, prompt)
        self._drop(turn, self._room.must_drop(turn.messages, self.n_ctx, turn.limit))
        turn.ceiling = None
        return True

    def _lower(self, turn: _RemoteTurn, refusal: Refusal, prompt: int | None) -> bool:
        """Ask for a shorter answer, if its length is what the server refuses."""
        n_ctx = self.n_ctx or _USUAL_CONTEXT
        if turn.ceiling is not None:
            return False
        if prompt is not None:
            turn.ceiling = n_ctx - prompt if prompt < n_ctx else None
        elif self.raw and turn.limit is None and (refusal.too_long or refusal.is_about_length):
            turn.ceiling = n_ctx // 2
        return turn.ceiling is not None

    def _drop(self, turn: _RemoteTurn, count: int) -> None:
        turn.messages = drop_oldest(turn.messages, count)
        turn.dropped += count

    def _overflowing(self, turn: _RemoteTurn, prompt: int | None, said: str) -> str:
        if prompt is None or self.n_ctx is None or prompt < self.n_ctx:
            return f"the context does not hold the conversation: {said}"
        what, remedy = blame(turn.messages)
        return (
            f"{what} is {prompt:,} tokens long and the context holds {self.n_ctx:,}; {remedy}, or "
            "give the server a larger context"
        )


def _wait(turn: _RemoteTurn) -> None:
    """Let the caller give up; the server does not say how far it has read."""
    turn.progress(0, 0, "tokens", "reading")
