"""JSON strings as rules: of any content or length, fixed ones, and names of properties."""

import json
from collections.abc import Iterable, Iterator

from dots1_local.chat.json_schema.characters import EVERY, Characters, charset, without
from dots1_local.chat.json_schema.rules import Rules, Symbols, text

__all__ = ["QUOTE", "Strings", "encoded", "literal", "other_name"]

QUOTE = charset('"')
_BACKSLASH = charset("\\")
_PLAIN = without(EVERY, ((0, 0x1F), *QUOTE, *_BACKSLASH))
_HEX = charset("0123456789abcdefABCDEF")


def literal(content: str) -> Symbols:
    """A fixed string in quotes; only what must be escaped is."""
    return text(json.dumps(content, ensure_ascii=False))


def encoded(some: Characters) -> Iterator[Symbols]:
    """The ways to write one character of the set; only what must be escaped is."""
    special = without(some, _PLAIN)
    if plain := without(some, special):
        yield (plain,)
    for low, high in special:
        for point in range(low, high + 1):
            yield literal(chr(point))[1:-1]


def _character(rules: Rules) -> int:
    """Any one character, plain or escaped in any way."""
    u, half, hexes = charset("u"), charset("dD"), (_HEX, _HEX)
    low_half = (_BACKSLASH, u, half, charset("cdefCDEF"), *hexes)
    escapes = (
        (charset('"\\/bfnrt'),),
        (u, without(_HEX, half), _HEX, *hexes),
        (u, half, charset("01234567"), *hexes),
        (u, half, charset("89abAB"), *hexes, *low_half),  # a surrogate pair
    )
    return rules.add((_PLAIN,), (_BACKSLASH, rules.add(*escapes)))


class Strings:
    """Strings of any characters; all in one grammar share the rules for their ends."""

    def __init__(self, rules: Rules) -> None:
        self._rules, self._character = rules, _character(rules)
        self._at_most = [rules.add((QUOTE,))]
        self._any = rules.reserve()
        rules.extend(self._any, [(QUOTE,), (self._character, self._any)])

    def sized(self, least: int = 0, most: int | None = None) -> Symbols:
        """A string of at least `least` characters, and at most `most`."""
        rest = self._any if most is None else self._rest(most - least)
        for _ in range(least):
            rest = self._rules.add((self._character, rest))
        return (QUOTE, rest)

    def _rest(self, count: int) -> int:
        known = self._at_most
        while len(known) <= count:
            known.append(self._rules.add((QUOTE,), (self._character, known[-1])))
        return known[count]


def other_name(rules: Rules, names: Iterable[str]) -> Symbols:
    """A string other than these names, of characters that need no escapes."""
    anything = rules.reserve()
    rules.extend(anything, [(QUOTE,), (_PLAIN, anything)])
    beginnings = {"": rules.reserve()}
    taken = {name for name in names if literal(name)[1:-1] == text(name)}
    for name in sorted(taken):
        for length in range(1, len(name) + 1):
            beginnings.setdefault(name[:length], rules.reserve())
    following: dict[str, list[str]] = {beginning: [] for beginning in beginnings}
    for beginning in beginnings:
        if beginning:
            following[beginning[:-1]].append(beginning)
    for beginning, rule in beginnings.items():
        longer = following[beginning]
        others = without(_PLAIN, charset("".join(each[-1] for each in longer)))
        ends: list[Symbols] = [] if beginning in taken else [(QUOTE,)]
        rules.extend(rule, [*ends, (others, anything)])
        rules.extend(rule, [(charset(each[-1]), beginnings[each]) for each in longer])
    return (QUOTE, beginnings[""])
