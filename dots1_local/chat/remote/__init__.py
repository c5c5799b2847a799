"""A conversation with a model on a server, as a `Session` is one with an engine here."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Self, Unpack

from dots1_local.chat.dialogue import Dialogue, SessionOptions
from dots1_local.chat.message import Message
from dots1_local.chat.remote.address import key_from
from dots1_local.chat.remote.reply import Refusal, Reply
from dots1_local.chat.remote.server import Server
from dots1_local.chat.sampling import Sampling
from dots1_local.chat.turns import (
    Turn,
    check_stop,
    count_turns,
    overflow_message,
    turns_to_drop,
)
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.progress import Progress

__all__ = ["RemoteSession"]

_USUAL_CONTEXT = 2048  # tokens, if the server does not tell
_TEMPLATE_BYTES = 8  # that a chat template puts around each message, roughly


@dataclass
class _RemoteTurn(Turn):
    """A turn that a server answers; `ceiling` is how long the context lets the answer be."""

    answer: Reply
    ceiling: int | None = field(default=None, kw_only=True)


class RemoteSession(Dialogue):
    """A conversation with a server's model; use it in a `with` statement.

    Figures that the server does not give are None. An answer that breaks off stays in the
    conversation as far as it arrived.
    """

    def __init__(
        self,
        server: Server,
        system: str | None = None,
        sampling: Sampling | None = None,
        **options: Unpack[SessionOptions],
    ) -> None:
        super().__init__(system, sampling, **options)
        self._server = server
        self._estimate = ContextEstimate()
        self._last: tuple[list[Message], int] | None = None  # a conversation and its tokens

    @classmethod
    def open(
        cls,
        url: str,
        model: str | None = None,
        *,
        notify: Callable[[str], None] = lambda sentence: None,
        **options: Any,
    ) -> Self:
        """Open a conversation with the server at `url`; `model` chooses one of several models.

        A key is taken from the environment: DOTS1_API_KEY, or else OPENAI_API_KEY. `notify` is that
        of `Server`, and `options` are those of the class.

        Raises:
            UsageError: the address is malformed, or `model` has to choose one of several.
            Dots1Error: no OpenAI-compatible server answers there.
        """
        return cls(Server(url, model, key_from(), notify), **options)

    @property
    def model(self) -> str:
        """The server's name of the model."""
        return self._server.model

    @property
    def title(self) -> str:
        """The model and the server's address."""
        return f"{self.model} at {self._server.url}"

    @property
    def n_ctx(self) -> int | None:
        """Tokens the context holds; None until the server tells."""
        return self._server.n_ctx

    @property
    def context_used(self) -> int | None:
        """Tokens of the conversation, as the server counted them after the last answer."""
        known = self._last is not None and self._last[0] is self.messages
        return self._last[1] if self._last and known else None

    def count(self, text: str) -> None:
        """Return None: only the server could count, and there is no common way to ask."""

    def _answer(
        self, asked: list[Message], limit: int | None, progress: Progress
    ) -> Generator[str, None, None]:
        check_stop(self.stop)
        if self.raw and not any(message.text for message in asked):
            raise UsageError("there is nothing to complete; give the beginning of a text")
        turn = _RemoteTurn(asked, limit, progress, Reply(), self.dropped)
        return self._streamed(turn, self._receive(turn))

    def _receive(self, turn: _RemoteTurn) -> Generator[str, None, None]:
        reply = turn.answer
        try:
            with closing(self._chunks(turn)) as chunks:
                for chunk in chunks:
                    yield reply.take(chunk)
            if not reply.finished:
                raise Dots1Error(f"{self._server.url} stopped in the middle of the answer")
        finally:
            if reply.begun:
                self._join(turn)

    def _join(self, turn: _RemoteTurn) -> None:
        """Make the turn part of the conversation."""
        self.messages = [*turn.messages, turn.answer.message()]
        dropped, self.dropped = turn.dropped - self.dropped, turn.dropped
        self.stats = stats = turn.answer.stats(turn.limit, self.n_ctx, dropped)
        if stats.prompt_tokens is not None:
            self._estimate.learn(turn.context, stats.prompt_tokens)
            self._last = self.messages, stats.prompt_tokens + stats.generated_tokens

    def _chunks(self, turn: _RemoteTurn) -> Generator[dict[str, Any], None, None]:
        """Yield what the server streams, once the conversation fits into its context."""
        if self.overflow == "drop":
            turn.dropped += self._turns_to_drop(turn) or 0

        def wake() -> None:  # the server does not tell how much of the prompt it has read
            turn.progress(0, 0, "tokens", "reading")

        while True:
            path, prompt = _prompt(turn.context, raw=self.raw)
            body = {**prompt, **_sampling(self.sampling), **self._bounds(turn)}
            try:
                yield from self._server.stream(path, body, wake)
                return
            except Refusal as refusal:
                if turn.answer.begun or not self._adapt(turn, refusal):
                    raise

    def _bounds(self, turn: _RemoteTurn) -> dict[str, Any]:
        """Return the parameters for the answer's length, stop strings and streaming."""
        most = min(filter(None, (turn.limit, turn.ceiling)), default=None)
        if most is None and self.raw:
            most = self.n_ctx  # text completions end after OpenAI's 16 tokens by default
        bounds: dict[str, Any] = {"max_tokens": most} if most or self.raw else {}
        if self.stop:
            bounds["stop"] = list(self.stop)
        return {**bounds, "stream": True, "stream_options": {"include_usage": True}}

    def _adapt(self, turn: _RemoteTurn, refusal: Refusal) -> bool:
        """Ask for a shorter answer or drop turns; return False if that would not help.

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
        if self.overflow == "stop" or count_turns(turn.context) < 2:
            raise Dots1Error(self._overflow_message(turn, prompt, refusal.said)) from refusal
        if prompt is not None:
            self._estimate.learn(turn.context, prompt)
        count = self._turns_to_drop(turn)
        turn.dropped += max(1, count_turns(turn.context) // 2 if count is None else count)
        turn.ceiling = None
        return True

    def _lower(self, turn: _RemoteTurn, refusal: Refusal, prompt: int | None) -> bool:
        """Ask for a shorter answer, if the server refuses its length."""
        n_ctx = self.n_ctx or _USUAL_CONTEXT
        if turn.ceiling is not None:
            return False
        if prompt is not None:
            turn.ceiling = n_ctx - prompt if prompt < n_ctx else None
        elif self.raw and turn.limit is None and (refusal.too_long or refusal.is_about_length):
            turn.ceiling = n_ctx // 2
        return turn.ceiling is not None

    def _turns_to_drop(self, turn: _RemoteTurn) -> int | None:
        return self._estimate.turns_to_drop(turn.context, self.n_ctx, turn.limit)

    def _overflow_message(self, turn: _RemoteTurn, prompt: int | None, said: str) -> str:
        if prompt is None or self.n_ctx is None or prompt < self.n_ctx:
            return f"the context does not hold the conversation: {said}"
        remedy = "give the server a larger context"
        return overflow_message(turn.context, prompt, self.n_ctx, remedy)


class ContextEstimate:
    """Estimates how many tokens a conversation is, by the tokens per byte the server counted."""

    def __init__(self) -> None:
        self._rate: float | None = None

    def learn(self, messages: Sequence[Message], tokens: int) -> None:
        """Remember that the server counted so many tokens in these messages."""
        self._rate = tokens / _bytes(messages) if messages else None

    def turns_to_drop(
        self, messages: Sequence[Message], n_ctx: int | None, limit: int | None
    ) -> int | None:
        """Return how many of the oldest turns to drop for an answer of up to `limit` tokens.

        As in a `Session`, an answer gets at most a quarter of the context at first. None if the
        server has not counted yet, or its context is unknown.
        """
        if self._rate is None or n_ctx is None:
            return None
        quarter = n_ctx // 4
        most = n_ctx - max(1, min(limit or quarter, quarter))
        if self._size(messages) <= most:
            return 0
        return turns_to_drop(messages, self._size, most)

    def _size(self, messages: Sequence[Message]) -> int:
        return round((self._rate or 0) * _bytes(messages))


def _bytes(messages: Sequence[Message]) -> int:
    return sum(_TEMPLATE_BYTES + len(m.text.encode("utf-8", errors="replace")) for m in messages)


def _prompt(messages: Sequence[Message], *, raw: bool) -> tuple[str, dict[str, Any]]:
    """Return the endpoint's path that answers the messages, and the parameters that hold them.

    An empty system prompt is sent if there is none, as servers and templates would add their own.
    """
    if raw:
        return "completions", {"prompt": "".join(message.text for message in messages)}
    if not any(message.role == "system" for message in messages):
        messages = [Message("system", ""), *messages]
    said = [{"role": message.role, "content": message.text} for message in messages]
    return "chat/completions", {"messages": said}


def _sampling(sampling: Sampling) -> Mapping[str, Any]:
    """Return the sampling parameters under the names of vLLM, SGLang and llama.cpp's server."""
    parameters: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
    }
    if sampling.repeat_penalty != 1:
        parameters["repetition_penalty"] = parameters["repeat_penalty"] = sampling.repeat_penalty
    if sampling.seed is not None:
        parameters["seed"] = sampling.seed % (1 << 32)  # as `Sampler` does; servers take no more
    if sampling.frequency_penalty or sampling.presence_penalty:
        parameters["frequency_penalty"] = sampling.frequency_penalty
        parameters["presence_penalty"] = sampling.presence_penalty
    if sampling.logit_bias:
        parameters["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    return parameters
