"""`--tensor-type REGEX=TYPE`: types that a user sets by tensor name, on top of any recipe.

As in stock llama-quantize, the expression is searched for anywhere in the tensor's name, case
does not matter, the first match in the order given wins, and a type that a row does not fit
still falls back.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dots1_local.errors import UsageError
from dots1_local.quant.types import quant_type

__all__ = ["Override", "overridden", "parse_override", "parse_overrides"]


@dataclass(frozen=True)
class Override:
    """Tensors whose name contains a match of `pattern` are stored as `type`."""

    pattern: re.Pattern[str]
    type: str


def parse_override(text: str) -> Override:
    """Read one `REGEX=TYPE`, split at the first equals sign.

    Raises:
        UsageError: a part is missing, the expression is invalid, or there is no such type.
    """
    expression, _, name = text.partition("=")
    if not expression or not name:
        raise UsageError(f"--tensor-type {text!r} is not of the form REGEX=TYPE")
    try:
        # Stock lower-cases the expression, which would turn \D into \d; ignoring case does not.
        pattern = re.compile(expression, re.IGNORECASE)
    except re.error as error:
        raise UsageError(f"--tensor-type {text!r} has an invalid expression: {error}") from None
    return Override(pattern, quant_type(name).name)


def parse_overrides(texts: Iterable[str]) -> tuple[Override, ...]:
    """Read several, in the order they are to be tried."""
    return tuple(parse_override(text) for text in texts)


def overridden(name: str, overrides: Sequence[Override]) -> str | None:
    """The type the first matching override gives the tensor called `name`, or None."""
    for override in overrides:
        if override.pattern.search(name):
            return override.type
    return None
