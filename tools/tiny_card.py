"""The model card of dots1-tiny, rendered from the numbers its training measured."""

from typing import Any

__all__ = ["card"]


def card(facts: dict[str, Any]) -> str:
    return "# dots1-tiny\n"
