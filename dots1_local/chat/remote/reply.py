"""What a server replies: an answer's text and figures, or an error in one of many shapes."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from dots1_local.chat.message import AnswerStats, Message, StopReason
from dots1_local.chat.remote.address import KEY_VARIABLES, Key
from dots1_local.errors import Dots1Error, readable
from dots1_local.files.json_file import JsonError, parse_json

__all__ = ["Refusal", "Reply", "TooLong", "count_in", "object_in", "server_error", "status_error"]

_BROKEN_OFF = ("abort", "error")  # finish reasons of vLLM and SGLang for incomplete answers
_NEAR = 16  # tokens that servers may leave free in a full context; SGLang leaves a few
_OVERFLOW_CODES = ("context_length_exceeded", "exceed_context_size_error")
_CONTEXT = re.compile(
    r"(?:maximum context length|maximum model length|context (?:length|size|window|holds))"
    r"\D{0,20}?([\d,]+)"
)
_PROMPT = [
    re.compile(pattern)
    for pattern in (
        r"([\d,]+) in the (?:messages|prompt)",
        r"([\d,]+) tokens from the input",
        r"([\d,]+) input tokens",
        r"\b(?:input|prompt|request|conversation|resulted in)\D{0,30}?([\d,]+)",
    )
]
_UNKNOWN = re.compile(
    r"unknown|unrecogni[sz]ed|unsupported|unexpected|extra|not (?:yet )?(?:permitted|allowed|supp)",
    re.IGNORECASE,
)


class Reply:
    """Collects the chunks of a streamed completion, or a whole completion as one chunk.

    Figures come from `usage`, and from the `timings` of llama.cpp's server; others stay unknown.
    Reasoning and tool calls are not kept.
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
        """Return the text in a chunk; fields of an unexpected shape are ignored."""
        self._usage = object_in(chunk, "usage") or self._usage
        self._timings = object_in(chunk, "timings") or self._timings
        choice = _first_choice(chunk.get("choices"))
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason not in _BROKEN_OFF:
            self._finish = reason
            # vLLM and SGLang name what stopped it: a stop string, or a token's id.
            cause = choice.get("stop_reason") or choice.get("matched_stop")
            self._stopped = isinstance(cause, str)
        if text := _text(choice):
            self._first = self._first or time.perf_counter()
            self._text.append(text)
        return text

    def message(self) -> Message:
        """Return the answer so far."""
        return Message("assistant", "".join(self._text))

    def stats(self, limit: int | None, n_ctx: int | None, dropped: int) -> AnswerStats:
        """Return how the answer went; call this at its end."""
        now = time.perf_counter()
        first = self._first or now
        written_from = first if len(self._text) > 1 else self._begun  # one piece has no pace
        prompt = count_in(self._usage, "prompt_tokens")
        told = count_in(self._usage, "completion_tokens")
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

    def _reused(self, prompt: int | None) -> int | None:
        details = object_in(self._usage, "prompt_tokens_details")
        for count in (count_in(details, "cached_tokens"), count_in(self._timings, "cache_n")):
            if count is not None and count <= (prompt or 0):
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


def object_in(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the object under a key, an empty one if there is none."""
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def count_in(value: Mapping[str, Any], key: str) -> int | None:
    """Return the integer from 0 to 2^53 under a key, if there is one."""
    found = value.get(key)
    return found if type(found) is int and 0 <= found < 1 << 53 else None


def _first_choice(choices: Any) -> Mapping[str, Any]:
    """Return the choice with index 0; no other was asked for."""
    found = choices if isinstance(choices, list) else ()
    objects = (choice for choice in found if isinstance(choice, dict))
    return next((choice for choice in objects if not choice.get("index")), {})


def _text(choice: Mapping[str, Any]) -> str:
    """Return the text of a streamed chat, of a text completion, or of a chat in one piece."""
    places = (object_in(choice, "delta"), "content"), (choice, "text")
    for place, key in (*places, (object_in(choice, "message"), "content")):
        if isinstance(text := place.get(key), str):
            return text
    return ""


def _seconds(milliseconds: Any, otherwise: float) -> float:
    plain = type(milliseconds) in (int, float) and 0 < milliseconds < 1e12
    return milliseconds / 1000 if plain else otherwise


@dataclass(frozen=True)
class TooLong:
    """Tokens of a prompt that the context does not hold, and of the context; None if unknown."""

    prompt: int | None
    n_ctx: int | None


class Refusal(Dots1Error):
    """A server's error: its HTTP `status`, the message it `said`, and the JSON `detail` around."""

    def __init__(self, sentence: str, status: int, said: str, detail: Mapping[str, Any]) -> None:
        super().__init__(sentence)
        self.status, self.said, self.detail = status, said, detail

    @property
    def loading(self) -> bool:
        """Whether the server is only loading its model."""
        return self.status == 503 and "loading" in self.said.lower()

    @property
    def too_long(self) -> TooLong | None:
        """The numbers, if the server says that the prompt is too long."""
        coded = any(self.detail.get(key) in _OVERFLOW_CODES for key in ("code", "type"))
        found = _CONTEXT.search(self.said)
        if not coded and (found is None or self.status not in (400, 413, 422)):
            return None
        sizes = (match for each in _PROMPT if (match := each.search(self.said)))
        prompt = next((_number(match[1]) for match in sizes), None)
        return TooLong(
            count_in(self.detail, "n_prompt_tokens") or prompt,
            count_in(self.detail, "n_ctx") or (_number(found[1]) if found else None),
        )

    def rejects_parameter(self, names: Sequence[str]) -> bool:
        """Whether the server says that it does not know one of these parameters."""
        if self.status not in (400, 422) or not _UNKNOWN.search(self._words):
            return False
        return any(re.search(rf"\b{name}\b", self._words) for name in names)

    @property
    def is_about_length(self) -> bool:
        """Whether the server rejects max_tokens."""
        return self.status in (400, 422) and "max_tokens" in self._words

    @property
    def _words(self) -> str:
        return f"{self.said} {json.dumps(dict(self.detail))}"


def status_error(
    head: httpx2.Response, body: bytes, *, url: str, key: Key | None, model: str, models: str
) -> Refusal:
    """Return the error for an answer of `url` whose status is not 200.

    `models` lists the names of the server's models.
    """
    try:
        said, detail = server_error(parse_json(body), key)
    except JsonError:
        said, detail = "", {}
    because = f": {said}" if said else ""
    match head.status_code:
        case 401 | 403 if key:
            sentence = f"{url} does not accept the key in {key.variable}{because}"
        case 401 | 403:
            sentence = f"{url} needs a key; set {KEY_VARIABLES[0]} to it{because}"
        case 404 if model and model in said:
            sentence = f"{url} has no model {model}; it has {models or 'no model list'}"
        case 404:
            sentence = f"{url} is not where the server's API is; check --url{because}"
        case 429 | 503:
            sentence = f"{url} is busy{because}; try again {_later(head)}"
        case status if 300 <= status < 400:
            place = _shown(head.headers.get("Location", "elsewhere"), key)
            sentence = f"{url} redirects to {place}; give --url the right address"
        case status:
            sentence = f"{url} answers with error {status}{because}"
    return Refusal(sentence, head.status_code, said, detail)


def _later(head: httpx2.Response) -> str:
    wait = head.headers.get("Retry-After", "")
    return f"in {wait} s" if wait.isascii() and wait.isdigit() and len(wait) < 6 else "later"


def server_error(value: Any, key: Key | None) -> tuple[str, dict[str, Any]]:
    """Return the message in a server's error object, without the key, and the object around it.

    OpenAI and most others put it under "error", older vLLM and SGLang at the top, FastAPI under
    "detail".
    """
    if not isinstance(value, dict):
        return "", {}
    inner = value.get("error")
    detail = inner if isinstance(inner, dict) else value
    for words in (detail.get("message"), inner, value.get("detail")):
        if isinstance(words, str):
            return _shown(words, key), detail
        if isinstance(words, list):
            return _shown("; ".join(map(_validation_message, words)), key), detail
    return "", detail


def _shown(words: str, key: Key | None) -> str:
    """Make words readable, with the key removed first: a cut could leave a part of it."""
    return readable(key.hidden_in(words) if key else words)


def _validation_message(entry: Any) -> str:
    """Format an entry of FastAPI's list: the field, and what is wrong with it."""
    if not isinstance(entry, dict):
        return str(entry)
    place = entry.get("loc")
    where = ".".join(map(str, place)) if isinstance(place, list) else ""
    return f"{where}: {entry.get('msg')}"


def _number(text: str) -> int | None:
    digits = text.replace(",", "")
    return int(digits) if 0 < len(digits) < 12 else None
