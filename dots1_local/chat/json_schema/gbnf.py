"""Rules as text in GBNF, llama.cpp's notation for grammars."""

from dots1_local.chat.json_schema.characters import escaped
from dots1_local.chat.json_schema.rules import Symbols

__all__ = ["gbnf"]


def gbnf(rules: list[list[Symbols]]) -> str:
    """The rules, one in a line; the first is called root, the others by their numbers."""
    return "".join(
        f"{_name(number)} ::= {' | '.join(map(_sequence, alternatives))}\n"
        for number, alternatives in enumerate(rules)
    )


def _sequence(sequence: Symbols) -> str:
    # An empty sequence is written as "": after a bare "|" llama.cpp would read on in the next line.
    return (
        " ".join(_name(each) if isinstance(each, int) else escaped(each) for each in sequence)
        or '""'
    )


def _name(rule: int) -> str:
    return f"r{rule}" if rule else "root"
