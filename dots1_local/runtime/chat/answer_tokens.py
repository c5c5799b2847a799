"""The tokens that a model wrote as its answers, where only a file says so."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dots1_local.runtime.chat.message import Message
from dots1_local.runtime.engine import Engine

__all__ = ["with_tokens"]

_ORDINARY = (1, 6)  # NORMAL and BYTE of enum llama_token_type


def with_tokens(
    messages: Sequence[Message], claims: Sequence[Any], engine: Engine
) -> list[Message]:
    """The messages, their answers with the tokens that are claimed for them in turn.

    A claim is believed if it is of ordinary tokens, which make up just the answer's text; without
    tokens, the text is tokenised, maybe otherwise than the model wrote it.
    """
    left, told = iter(claims), []
    for message in messages:
        claim = next(left, None) if message.role == "assistant" else None
        known = message.tokens is not None or claim is None
        told.append(
            message if known else replace(message, tokens=_believed(message.text, claim, engine))
        )
    return told


def _believed(text: str, claim: Any, engine: Engine) -> tuple[int, ...] | None:
    kinds = engine.gguf.keys.get("tokenizer.ggml.token_type")
    if not isinstance(claim, list) or not isinstance(kinds, list):
        return None
    for token in claim:
        if type(token) is not int or not 0 <= token < min(engine.n_vocab, len(kinds)):
            return None
        if kinds[token] not in _ORDINARY:
            return None
    said = b"".join(map(engine.piece, claim)).decode("utf-8", errors="replace")
    return tuple(claim) if said == text else None
