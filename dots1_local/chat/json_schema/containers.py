"""JSON objects and arrays as rules, with the white space that a document may have.

After an opening bracket or a comma, and before a closing bracket, there may be one space, or a line
break and indentation. After a colon there may be one space.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dots1_local.chat.json_schema.characters import charset
from dots1_local.chat.json_schema.rules import Rules, Symbols, text
from dots1_local.chat.json_schema.strings import Strings, literal, other_name

__all__ = ["Containers", "Property"]

_INDENTATION = 32
_COMMA, _COLON = charset(","), charset(":")


@dataclass(frozen=True)
class Property:
    """A property that a schema names, and the rule for its value."""

    name: str
    value: int
    required: bool


class Containers:
    """The rules that objects and arrays share: `gap` is white space, `anything` any value."""

    def __init__(self, rules: Rules, strings: Strings) -> None:
        self._rules = rules
        indentation = rules.add(())
        for _ in range(_INDENTATION):
            indentation = rules.add((), (charset(" \t"), indentation))
        self.gap = rules.add((), (charset(" "),), (charset("\n"), indentation))
        self._colon = rules.add((_COLON,), (_COLON, charset(" ")))
        name = rules.add(strings.sized())
        self.anything = rules.reserve()
        self.any_object = rules.add(*self.members(name, self.anything))
        self.any_array = rules.add(*self.array((), self.anything))

    def members(self, name: int, value: int) -> list[Symbols]:
        """An object of any number of properties, with rules for their names and values."""
        more = self._rules.reserve()
        member = self._rules.add((name, self._colon, value, more))
        self._rules.extend(more, [(_COMMA, self.gap, member), (self.gap, charset("}"))])
        return [(charset("{"), self.gap, self._rules.add((member,), (charset("}"),)))]

    def object(self, properties: Sequence[Property], further: int | None) -> list[Symbols]:
        """Properties in this order, where optional ones may be missing, then further ones."""
        rules, last = self._rules, len(properties)
        required = [at for at, each in enumerate(properties) if each.required]
        complete = required[-1] + 1 if required else 0  # from here on the object may end
        nexts = [rules.reserve() for _ in range(last + 1)]
        mores = [rules.reserve() for _ in range(last + 1)]
        for at, more in enumerate(mores):
            rules.extend(more, [(_COMMA, self.gap, nexts[at])])
            if at >= complete:
                rules.extend(more, [(self.gap, charset("}"))])
        for at, each in enumerate(properties):
            name = rules.add(literal(each.name))
            rules.extend(nexts[at], [(name, self._colon, each.value, mores[at + 1])])
            if not each.required:
                rules.extend(nexts[at], [(nexts[at + 1],)])
        if further is not None:
            name = rules.add(other_name(rules, [each.name for each in properties]))
            rules.extend(nexts[last], [(name, self._colon, further, mores[last])])
        ends: list[Symbols] = [] if complete else [(charset("}"),)]
        return [(charset("{"), self.gap, rules.add((nexts[0],), *ends))]

    def array(
        self, first: Sequence[int], rest: int, least: int = 0, most: int | None = None
    ) -> list[Symbols]:
        """`least` to `most` items; the `first` ones have rules of their own."""
        rules, end = self._rules, (self.gap, charset("]"))
        if most is None:
            reach = max(least, len(first))
            following = rules.reserve()
            rules.extend(following, [(_COMMA, self.gap, rest, following), end])
        else:
            reach = most
            following = rules.add(end)
        for at in reversed(range(1, reach)):
            item = first[at] if at < len(first) else rest
            ends = [end] if at >= least else []
            following = rules.add((_COMMA, self.gap, item, following), *ends)
        start: list[Symbols] = [] if least else [(charset("]"),)]
        if most != 0:
            start.append((first[0] if first else rest, following))
        return [(charset("["), self.gap, rules.add(*start))]

    def constant(self, value: Any) -> Symbols:
        """A fixed value, with an object's properties in their order."""
        if isinstance(value, dict) and value:
            parts = [
                (*literal(name), self._colon, *self.constant(each)) for name, each in value.items()
            ]
            return self._enclosed("{", parts, "}")
        if isinstance(value, list) and value:
            return self._enclosed("[", [self.constant(each) for each in value], "]")
        return text(json.dumps(value, ensure_ascii=False))

    def _enclosed(self, start: str, parts: Sequence[Symbols], end: str) -> Symbols:
        inside = [symbol for part in parts for symbol in (_COMMA, self.gap, *part)]
        return (charset(start), *inside[1:], self.gap, charset(end))
