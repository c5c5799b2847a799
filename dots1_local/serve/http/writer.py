"""What responses of both endpoints have in common: a head, choices, usage."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dots1_local.serve.generation import Finished, Piece, TokenLogprob
from dots1_local.serve.http.options import Options

__all__ = ["Collected", "Document", "Writer", "logprob", "token_name"]

Document = dict[str, Any]  # a JSON object that a client is sent

_UNLIKELY = -9999.0  # OpenAI's for minus infinity, which JSON cannot say


@dataclass
class Collected:
    """One choice as far as it is written; `finished` is set at its end."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None

    def add(self, event: Piece | Finished) -> None:
        if isinstance(event, Finished):
            self.finished = event
        else:
            self.text += event.text
            self.logprobs += event.logprobs


class Writer(ABC):
    """Makes the JSON documents of one response, in chunks or whole."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: str, options: Options, choices: int) -> None:
        self.options, self.choices = options, choices
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": model,
        }

    def begin(self) -> list[Document]:
        """The chunks before any text."""
        return []

    @abstractmethod
    def piece(self, piece: Piece) -> list[Document]:
        """The chunks for a piece of text."""

    @abstractmethod
    def finish(self, finished: Finished) -> list[Document]:
        """The chunks that end a choice."""

    def end(self, answers: Sequence[Finished]) -> list[Document]:
        """The chunks after all choices."""
        if not self.options.include_usage:
            return []
        return [
            {**self._head, "object": self.chunk_kind, "choices": [], "usage": self._usage(answers)}
        ]

    def whole(self, answers: Sequence[Collected]) -> Document:
        """All of the response."""
        finished = [answer.finished for answer in answers if answer.finished]
        return {
            **self._head,
            "object": self.kind,
            "choices": [self._choice(index, answer) for index, answer in enumerate(answers)],
            "usage": self._usage(finished),
        }

    @abstractmethod
    def _choice(self, index: int, answer: Collected) -> Document:
        """A choice of a whole response."""

    def _chunk(self, index: int, reason: str | None = None, **fields: Any) -> Document:
        choice = {"index": index, **fields, "finish_reason": reason}
        usage = {"usage": None} if self.options.include_usage else {}
        return {**self._head, "object": self.chunk_kind, "choices": [choice], **usage}

    def _usage(self, answers: Sequence[Finished]) -> Document:
        """Token counts; a prompt counts once, however many choices it has."""
        firsts = [each for each in answers if each.index % self.options.n == 0]
        prompt = sum(each.prompt_tokens for each in firsts)
        completion = sum(each.completion_tokens for each in answers)
        cached = sum(each.cached_tokens for each in firsts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def logprob(value: float) -> float:
    """A log-probability that JSON can hold."""
    return max(value, _UNLIKELY)


def token_name(piece: bytes) -> str:
    """A token's text, with \\x escapes for bytes that make up only part of a character."""
    return piece.decode("utf-8", errors="backslashreplace")
