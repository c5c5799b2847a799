"""Rules as text in llama.cpp's notation."""

from dots1_local.runtime.chat.json_schema.characters import escaped
from dots1_local.runtime.chat.json_schema.rules import Sequence

__all__ = ["gbnf"]


def gbnf(rules: list[list[Sequence]]) -> str:
    """The rules a line each; the first is called root, the others by their numbers."""
    return "".join(
        f"{_name(number)} ::= {' | '.join(map(_sequence, alternatives))}\n"
        for number, alternatives in enumerate(rules)
    )


def _sequence(sequence: Sequence) -> str:
    # Not nothing at all: after a "|" llama.cpp would read on in the next line.
    return (
        " ".join(_name(each) if isinstance(each, int) else escaped(each) for each in sequence)
        or '""'
    )


def _name(rule: int) -> str:
    return f"r{rule}" if rule else "root"
