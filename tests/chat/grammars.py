"""Texts checked against grammars and written by them, a byte or token at a time."""

import random
from typing import Any

import numpy as np

from dots1_local.chat.grammar import Grammar
from tests.helpers import EOS, EOT, TOKENS

LONGEST = 1000  # tokens


def thing(required: list[str] | None = None, /, **properties: Any) -> dict[str, Any]:
    """Return the schema of an object."""
    return {"type": "object", "properties": properties, "required": required or []}


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether the grammar takes all the bytes one after another, and then the end."""
    matcher = grammar.matcher()
    return all(map(matcher.accept, text.encode())) and matcher.accept(EOS)


def written(grammar: Grammar, rng: random.Random, patience: int = 40) -> str | None:
    """Return a random text of the grammar, which closes what is open after `patience` tokens.

    Return None if the text has no end after LONGEST tokens.
    """
    matcher, text = grammar.matcher(), b""
    for count in range(LONGEST):
        allowed = np.flatnonzero(matcher.mask()).tolist()
        closing = [token for token in (EOS, *b'"]}') if token in allowed and count > patience]
        token = closing[0] if closing else rng.choice(allowed)
        assert matcher.accept(token)
        if token in (EOS, EOT):
            return text.decode()
        text += bytes([token]) if token < 256 else TOKENS[token].encode()
    return None
