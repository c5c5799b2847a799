"""JSON strings as rules: any, of a length, a fixed one, or the names of further properties."""

import json
from collections.abc import Iterable, Iterator

from dots1_local.runtime.chat.json_schema.characters import EVERY, Characters, of, without
from dots1_local.runtime.chat.json_schema.rules import Rules, Sequence, text

__all__ = ["QUOTE", "Strings", "encoded", "literal", "other_name"]

QUOTE = of('"')
_BACKSLASH = of("\\")
_PLAIN = without(EVERY, ((0, 0x1F), *QUOTE, *_BACKSLASH))
_HEX = of("0123456789abcdefABCDEF")


def literal(content: str) -> Sequence:
    """A fixed string in its quotes; only what must be escaped is."""
    return text(json.dumps(content, ensure_ascii=False))


def encoded(some: Characters) -> Iterator[Sequence]:
    """The ways to write a character of the set; only what must be escaped is."""
    special = without(some, _PLAIN)
    if plain := without(some, special):
        yield (plain,)
    for low, high in special:
        for point in range(low, high + 1):
            yield literal(chr(point))[1:-1]


def _character(rules: Rules) -> int:
    """Any one character, escaped in any way."""
    u, half, hexes = of("u"), of("dD"), (_HEX, _HEX)
    low_half = (_BACKSLASH, u, half, of("cdefCDEF"), *hexes)
    escapes = (
        (of('"\\/bfnrt'),),
        (u, without(_HEX, half), _HEX, *hexes),
        (u, half, of("01234567"), *hexes),
        (u, half, of("89abAB"), *hexes, *low_half),  # one of more than 16 bits
    )
    return rules.add((_PLAIN,), (_BACKSLASH, rules.add(*escapes)))


class Strings:
    """Strings of any characters; what they end in is shared by all of one grammar."""

    def __init__(self, rules: Rules) -> None:
        self._rules, self._character = rules, _character(rules)
        self._at_most = [rules.add((QUOTE,))]
        self._any = rules.reserve()
        rules.extend(self._any, [(QUOTE,), (self._character, self._any)])

    def sized(self, least: int = 0, most: int | None = None) -> Sequence:
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


def other_name(rules: Rules, names: Iterable[str]) -> Sequence:
    """A string that is none of these, of characters that need no escapes."""
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
        others = without(_PLAIN, of("".join(each[-1] for each in longer)))
        ends: list[Sequence] = [] if beginning in taken else [(QUOTE,)]
        rules.extend(rule, [*ends, (others, anything)])
        rules.extend(rule, [(of(each[-1]), beginnings[each]) for each in longer])
    return (QUOTE, beginnings[""])
