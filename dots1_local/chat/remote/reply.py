"""An answer as a server streams it: its text, why it ended, and the server's figures."""

import time
from collections.abc import Mapping
from typing import Any

from dots1_local.chat.message import AnswerStats, Message, StopReason

__all__ = ["Reply"]

_GIVEN_UP = ("abort", "error")  # finish reasons of vLLM and SGLang for answers that broke off
_NEAR = 16  # tokens that servers may leave free in a full context; SGLang leaves a few


class Reply:
    """Takes the chunks of a completion, or a whole one from a server that does not stream.

    Figures are taken from `usage`, and from the `timings` of llama.cpp's server; others stay
    unknown. Reasoning and tool calls are not kept.
    """

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._first: float | None = None
        self._text: list[str] = []
        self._finish = ""
        self._stopped = False
        self._usage: Mapping[str, Any] = {}
        self._timings: Mapping[str, Any] = {}

    @property
    def begun(self) -> bool:
        """Whether an answer has begun, even an empty one."""
        return bool(self._text or self._finish)

    @property
    def finished(self) -> bool:
        """Whether the server said that the answer is complete."""
        return bool(self._finish)

    def take(self, chunk: Mapping[str, Any]) -> str:
        """The text in a chunk; fields of an unexpected shape are ignored."""
        self._usage = _object(chunk.get("usage")) or self._usage
        self._timings = _object(chunk.get("timings")) or self._timings
        choice = _first(chunk.get("choices"))
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason not in _GIVEN_UP:
            self._finish = reason
            # vLLM and SGLang say what stopped it: a stop string, or a token by its number.
            told = choice.get("stop_reason") or choice.get("matched_stop")
            self._stopped = isinstance(told, str)
        return self._add(_text(choice))

    def message(self) -> Message:
        """The answer so far."""
        return Message("assistant", "".join(self._text))

    def stats(self, limit: int | None, n_ctx: int | None, dropped: int) -> AnswerStats:
        """How the answer went; call this at its end."""
        now = time.perf_counter()
        first = self._first or now
        written_from = first if len(self._text) > 1 else self._begun  # one piece has no pace
        prompt = _count(self._usage.get("prompt_tokens"))
        told = _count(self._usage.get("completion_tokens"))
        written = len(self._text) if told is None else told
        return AnswerStats(
            prompt,
            self._reused(prompt),
            written,
            _seconds(self._timings.get("prompt_ms"), first - self._begun),
            _seconds(self._timings.get("predicted_ms"), now - written_from),
            self._stop(written, limit, None if prompt is None else prompt + written, n_ctx),
            dropped,
            estimate=told is None,
        )

    def _add(self, text: str) -> str:
        if text:
            self._first = self._first or time.perf_counter()
            self._text.append(text)
        return text

    def _reused(self, prompt: int | None) -> int | None:
        details = _object(self._usage.get("prompt_tokens_details"))
        for value in (details.get("cached_tokens"), self._timings.get("cache_n")):
            if (count := _count(value)) is not None and count <= (prompt or 0):
                return count
        return None

    def _stop(
        self, written: int, limit: int | None, used: int | None, n_ctx: int | None
    ) -> StopReason:
        match self._finish:
            case "":
                return "interrupted"
            case "length":
                full = used is not None and n_ctx is not None and used + _NEAR >= n_ctx
                reached = limit is not None and written >= limit
                return "context" if full and not reached else "length"
            case _:
                return "stop" if self._stopped else "end"


def _first(choices: Any) -> Mapping[str, Any]:
    """The choice with index 0, which is all that was asked for."""
    found = map(_object, choices) if isinstance(choices, list) else ()
    return next((choice for choice in found if not choice.get("index")), {})


def _text(choice: Mapping[str, Any]) -> str:
    """A choice's text: of a streamed chat, a text completion, or a chat in one piece."""
    found = (
        _object(choice.get("delta")).get("content"),
        choice.get("text"),
        _object(choice.get("message")).get("content"),
    )
    text = next((each for each in found if isinstance(each, str)), "")
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 53 else None


def _seconds(milliseconds: Any, otherwise: float) -> float:
    plain = type(milliseconds) in (int, float) and 0 < milliseconds < 1e12
    return milliseconds / 1000 if plain else otherwise
