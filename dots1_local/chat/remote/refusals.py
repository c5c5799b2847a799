"""Errors that servers answer with, in their various shapes, and what can be learnt from them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dots1_local.chat.remote.address import KEY_VARIABLES, Key
from dots1_local.chat.remote.connection import readable
from dots1_local.chat.remote.exchange import Head
from dots1_local.chat.remote.models import name_list
from dots1_local.errors import Dots1Error

__all__ = ["Refusal", "TooLong", "complaint", "refusal_of"]

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
        """The numbers, if the server complains of a prompt that is too long."""
        coded = {self.detail.get("code"), self.detail.get("type")} & set(_OVERFLOW_CODES)
        found = _CONTEXT.search(self.said)
        if not coded and (found is None or self.status not in (400, 413, 422)):
            return None
        sizes = (match for each in _PROMPT if (match := each.search(self.said)))
        prompt = next((_number(match[1]) for match in sizes), None)
        n_ctx = _number(found[1]) if found else None
        return TooLong(
            _count(self.detail.get("n_prompt_tokens"), prompt),
            _count(self.detail.get("n_ctx"), n_ctx),
        )

    def knows_not(self, names: Sequence[str]) -> bool:
        """Whether the server complains that it does not know one of these parameters."""
        if self.status not in (400, 422) or not _UNKNOWN.search(self._words):
            return False
        return any(re.search(rf"\b{name}\b", self._words) for name in names)

    @property
    def is_about_length(self) -> bool:
        """Whether the server complains of max_tokens."""
        return self.status in (400, 422) and "max_tokens" in self._words

    @property
    def _words(self) -> str:
        return f"{self.said} {json.dumps(dict(self.detail))}"


def refusal_of(
    head: Head, body: bytes, *, url: str, key: Key | None, model: str, models: Sequence[str]
) -> Refusal:
    """The error for an answer that is not what `url` was asked for."""
    try:
        said, detail = complaint(json.loads(body), key)
    except (ValueError, RecursionError):
        said, detail = "", {}
    because = f": {said}" if said else ""
    match head.status:
        case 401 | 403 if key:
            sentence = f"{url} does not take the key in {key.variable}{because}"
        case 401 | 403:
            sentence = f"{url} wants a key; set {KEY_VARIABLES[0]} to it{because}"
        case 404 if model and model in said:
            known = f"it has {name_list(models)}" if models else "it tells of none"
            sentence = f"{url} has no model {model}; {known}"
        case 404:
            sentence = f"{url} is not where the server's API is; check --url{because}"
        case 429 | 503:
            sentence = f"{url} is busy{because}; try again {_later(head)}"
        case status if 300 <= status < 400:
            place = _shown(head.headers.get("Location", "elsewhere"), key)
            sentence = f"{url} sends on to {place}; give --url the address that is meant"
        case status:
            sentence = f"{url} answers with error {status}{because}"
    return Refusal(sentence, head.status, said, detail)


def _later(head: Head) -> str:
    wait = head.headers.get("Retry-After", "")
    return f"in {wait} s" if wait.isascii() and wait.isdigit() and len(wait) < 6 else "later"


def complaint(value: Any, key: Key | None) -> tuple[str, dict[str, Any]]:
    """The message in a server's error object, without the key, and the object it is in.

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
            return _shown("; ".join(map(_of_one, words)), key), detail
    return "", detail


def _shown(words: str, key: Key | None) -> str:
    """Readable words, the key removed first: cutting them short could leave a part of it."""
    return readable(key.hidden_in(words) if key else words)


def _of_one(entry: Any) -> str:
    """One entry of FastAPI's list: what is wrong, and where."""
    if not isinstance(entry, dict):
        return str(entry)
    place = entry.get("loc")
    where = ".".join(map(str, place)) if isinstance(place, list) else ""
    return f"{where}: {entry.get('msg')}"


def _number(text: str) -> int | None:
    digits = text.replace(",", "")
    return int(digits) if 0 < len(digits) < 12 else None


def _count(value: Any, otherwise: int | None) -> int | None:
    return value if type(value) is int and value > 0 else otherwise
