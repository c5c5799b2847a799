"""JSON objects and arrays as rules, with the whitespace that a document may have.

That is at most one space, or a new line and its indentation: after a bracket that opens and a
comma, and before a bracket that closes. A colon may be followed by a space.
"""

import json
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any

from dots1_local.runtime.chat.json_schema.characters import of
from dots1_local.runtime.chat.json_schema.rules import Rules, Sequence, text
from dots1_local.runtime.chat.json_schema.strings import Strings, literal, other_name

__all__ = ["Containers", "Property"]

_INDENTATION = 32
_COMMA, _COLON = of(","), of(":")


@dataclass(frozen=True)
class Property:
    """A property that a schema names, and the rule for its value."""

    name: str
    value: int
    required: bool


class Containers:
    """`gap` is the rule for whitespace, `anything` that for any value."""

    def __init__(self, rules: Rules, strings: Strings) -> None:
        self._rules = rules
        indentation = rules.add(())
        for _ in range(_INDENTATION):
            indentation = rules.add((), (of(" \t"), indentation))
        self.gap = rules.add((), (of(" "),), (of("\n"), indentation))
        self._colon = rules.add((_COLON,), (_COLON, of(" ")))
        name = rules.add(strings.sized())
        self.anything = rules.reserve()
        self.any_object = rules.add(*self.members(name, self.anything))
        self.any_array = rules.add(*self.array((), self.anything))

    def members(self, name: int, value: int) -> list[Sequence]:
        """An object of any number of properties, of whose names the rule is `name`."""
        more = self._rules.reserve()
        member = self._rules.add((name, self._colon, value, more))
        self._rules.extend(more, [(_COMMA, self.gap, member), (self.gap, of("}"))])
        return [(of("{"), self.gap, self._rules.add((member,), (of("}"),)))]

    def object(self, properties: List[Property], further: int | None) -> list[Sequence]:
        """Properties in this order, the optional ones or not, and further ones of other names."""
        rules, last = self._rules, len(properties)
        required = [at for at, each in enumerate(properties) if each.required]
        complete = required[-1] + 1 if required else 0  # from here on the object may end
        nexts = [rules.reserve() for _ in range(last + 1)]
        mores = [rules.reserve() for _ in range(last + 1)]
        for at, more in enumerate(mores):
            rules.extend(more, [(_COMMA, self.gap, nexts[at])])
            if at >= complete:
                rules.extend(more, [(self.gap, of("}"))])
        for at, each in enumerate(properties):
            name = rules.add(literal(each.name))
            rules.extend(nexts[at], [(name, self._colon, each.value, mores[at + 1])])
            if not each.required:
                rules.extend(nexts[at], [(nexts[at + 1],)])
        if further is not None:
            name = rules.add(other_name(rules, [each.name for each in properties]))
            rules.extend(nexts[last], [(name, self._colon, further, mores[last])])
        ends: list[Sequence] = [] if complete else [(of("}"),)]
        return [(of("{"), self.gap, rules.add((nexts[0],), *ends))]

    def array(
        self, first: List[int], rest: int, least: int = 0, most: int | None = None
    ) -> list[Sequence]:
        """`least` to `most` items, the first few of them with rules of their own."""
        rules, end = self._rules, (self.gap, of("]"))
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
        start: list[Sequence] = [] if least else [(of("]"),)]
        if most != 0:
            start.append((first[0] if first else rest, following))
        return [(of("["), self.gap, rules.add(*start))]

    def constant(self, value: Any) -> Sequence:
        """A fixed value, an object's properties in their order."""
        if isinstance(value, dict) and value:
            parts = [
                (*literal(name), self._colon, *self.constant(each)) for name, each in value.items()
            ]
            return self._enclosed("{", parts, "}")
        if isinstance(value, list) and value:
            return self._enclosed("[", [self.constant(each) for each in value], "]")
        return text(json.dumps(value, ensure_ascii=False))

    def _enclosed(self, start: str, parts: List[Sequence], end: str) -> Sequence:
        inside = [symbol for part in parts for symbol in (_COMMA, self.gap, *part)]
        return (of(start), *inside[1:], self.gap, of(end))
