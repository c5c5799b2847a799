"""A JSON schema as rules of a grammar."""

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from dots1_local.chat.json_schema.containers import Containers, Property
from dots1_local.chat.json_schema.distinct import check_distinct
from dots1_local.chat.json_schema.formats import FORMATS
from dots1_local.chat.json_schema.numbers import EXACT, Bound, integer, number
from dots1_local.chat.json_schema.pattern import pattern
from dots1_local.chat.json_schema.reading import Reader, count, unsupported
from dots1_local.chat.json_schema.rules import Rules, Symbols, text
from dots1_local.chat.json_schema.strings import Strings
from dots1_local.chat.json_schema.types import TYPES, has_type, same, types_written
from dots1_local.errors import UsageError
from dots1_local.files.json_file import brief

__all__ = ["Compiler"]

_MOST_SCHEMAS = 5000
_LONGEST_STRING = 4000  # a longer maximum is this one
_MOST_ITEMS = 1000
_WIDEST_INTEGER = 28
_KNOWN = {"$ref", "anyOf", "oneOf", "enum", "const", "type", "nullable"}.union(*TYPES.values())

_Schema = dict[str, Any]


class Compiler:
    """Turns one schema into `rules`."""

    def __init__(self, schema: Any) -> None:
        self._schema, self._reader = schema, Reader(schema)
        self.rules = rules = Rules()
        self._strings = Strings(rules)
        self._containers = Containers(rules, self._strings)
        self._of_type = {
            "null": rules.add(text("null")),
            "boolean": rules.add(text("true"), text("false")),
            "integer": rules.add(*integer(rules, None, None)),
            "number": rules.add(*number(rules, None, None)),
            "string": rules.add(self._strings.sized()),
            "array": self._containers.any_array,
            "object": self._containers.any_object,
        }
        simple = [each for name, each in self._of_type.items() if name != "integer"]
        rules.extend(self._containers.anything, [(each,) for each in simple])
        self._referred: dict[str, int] = {}
        self._waiting: list[tuple[int, Any, str]] = []
        self._count = 0

    def compile(self) -> int:
        """The rule for a whole document.

        Raises:
            UsageError: it is no schema, or uses what is not supported.
        """
        root = self._referred["#"] = self._value(self._schema, "#")
        while self._waiting:
            rule, part, place = self._waiting.pop()
            self.rules.extend(rule, self._alternatives(part, place))
        return root

    def _value(self, schema: Any, place: str) -> int:
        """A rule for a part of the schema; `compile` fills it in later."""
        self._count += 1
        if self._count > _MOST_SCHEMAS:
            raise UsageError(f"the schema has more than {_MOST_SCHEMAS:,} parts")
        rule = self.rules.reserve()
        self._waiting.append((rule, schema, place))
        return rule

    def _alternatives(self, schema: Any, place: str) -> Iterator[Symbols]:
        if isinstance(schema, dict) and schema.get("nullable") is True:
            yield (self._of_type["null"],)
        flat = self._reader.flat(schema, place)
        if isinstance(flat, bool):
            if flat:
                yield (self._containers.anything,)
            return
        if unknown := [name for name in flat if name not in _KNOWN]:
            raise unsupported(unknown, place)
        flat.pop("nullable", None)
        if "$ref" in flat:
            yield (self._reference(flat["$ref"], place),)
        elif "anyOf" in flat or "oneOf" in flat:
            yield from self._any_of(flat, place)
        elif "enum" in flat or "const" in flat:
            yield from self._listed(flat, place)
        else:
            for name in types_written(flat, place):
                keywords = {key: flat[key] for key in TYPES[name] if key in flat}
                yield from self._typed(name, keywords, place)

    def _reference(self, reference: Any, place: str) -> int:
        part = self._reader.referred(reference, place)
        if reference not in self._referred:
            self._referred[reference] = self._value(part, reference)
        return self._referred[reference]

    def _any_of(self, schema: _Schema, place: str) -> Iterator[Symbols]:
        name = "anyOf" if "anyOf" in schema else "oneOf"
        parts, rest = schema[name], {key: schema[key] for key in schema if key != name}
        if not isinstance(parts, list) or not parts:
            raise UsageError(f"{name} at {place} is {brief(parts)}, not a list of schemas")
        if name == "oneOf":
            check_distinct(self._reader, parts, place)
        for at, part in enumerate(parts):
            whole = self._reader.merged(rest, part, place) if rest else part
            yield (self._value(whole, f"{place}/{name}/{at}"),)

    def _listed(self, schema: _Schema, place: str) -> Iterator[Symbols]:
        if others := [key for key in schema if key not in ("enum", "const", "type")]:
            raise unsupported([f"{others[0]} with enum or const"], place)
        lists = [schema["enum"]] if "enum" in schema else []
        lists += [[schema["const"]]] if "const" in schema else []
        if not all(isinstance(each, list) for each in lists):
            raise UsageError(f"enum at {place} is {brief(lists[0])}, not a list of values")
        types = types_written(schema, place)
        for value in lists[0]:
            listed = all(any(same(value, each) for each in values) for values in lists[1:])
            if listed and any(has_type(value, name) for name in types):
                yield self._containers.constant(value)

    def _typed(self, name: str, keywords: _Schema, place: str) -> list[Symbols]:
        if name in ("integer", "number") and keywords:
            return self._bounded(name, keywords, place)
        if name == "string" and keywords:
            return self._string(keywords, place)
        if name == "array" and keywords:
            return self._array(keywords, place)
        if name == "object" and keywords:
            return self._object(keywords, place)
        return [(self._of_type[name],)]

    def _bounded(self, name: str, keywords: _Schema, place: str) -> list[Symbols]:
        low = _bound(keywords, "minimum", "exclusiveMinimum", name, place)
        high = _bound(keywords, "maximum", "exclusiveMaximum", name, place)
        return (integer if name == "integer" else number)(self.rules, low, high)

    def _string(self, keywords: _Schema, place: str) -> list[Symbols]:
        if len(keywords) > 1 and ("pattern" in keywords or "format" in keywords):
            raise unsupported([" with ".join(sorted(keywords))], place)
        if "pattern" in keywords:
            source = keywords["pattern"]
            if not isinstance(source, str):
                raise UsageError(f"pattern at {place} is {brief(source)}, not a text")
            return [pattern(self.rules, source, place)]
        if "format" in keywords:
            known = FORMATS.get(str(keywords["format"]))
            if known is None:
                raise UsageError(
                    f"format at {place} is {brief(keywords['format'])}, not one of those "
                    f"supported: {', '.join(FORMATS)}"
                )
            return [pattern(self.rules, known, place)]
        least, most = _range(keywords, "Length", _LONGEST_STRING, place)
        return [self._strings.sized(least, most)] if most is None or least <= most else []

    def _array(self, keywords: _Schema, place: str) -> list[Symbols]:
        parts, rest = keywords.get("prefixItems", []), keywords.get("items", True)
        if not isinstance(parts, list):
            raise UsageError(f"prefixItems at {place} is {brief(parts)}, not a list of schemas")
        first = [self._value(part, f"{place}/prefixItems/{n}") for n, part in enumerate(parts)]
        least, most = _range(keywords, "Items", _MOST_ITEMS, place)
        if most is not None and least > most:
            return []
        item = self._value(rest, f"{place}/items")
        return self._containers.array(first, item, least, most)

    def _object(self, keywords: _Schema, place: str) -> list[Symbols]:
        parts, required = keywords.get("properties", {}), keywords.get("required", [])
        if not isinstance(parts, dict):
            raise UsageError(f"properties at {place} is {brief(parts)}, not an object of schemas")
        if not isinstance(required, list) or not all(isinstance(each, str) for each in required):
            raise UsageError(f"required at {place} is {brief(required)}, not a list of names")
        # Further properties are valid by default, but written only where the schema says so or
        # names none.
        further = keywords.get("additionalProperties", not parts and not required)
        unnamed = keywords.get("additionalProperties", True)
        if not parts and not required and further is True:
            return [(self._containers.any_object,)]
        named = {**parts, **{name: unnamed for name in required if name not in parts}}
        properties = [
            Property(name, self._value(part, f"{place}/properties/{name}"), name in required)
            for name, part in named.items()
        ]
        others = self._value(further, f"{place}/additionalProperties")
        return self._containers.object(properties, others)


def _bound(
    keywords: _Schema, inclusive: str, exclusive: str, name: str, place: str
) -> Bound | None:
    bounds = []
    for key in (inclusive, exclusive):
        value = keywords.get(key)
        if key not in keywords:
            continue
        if type(value) not in (int, float):
            raise UsageError(f"{key} at {place} is {brief(value)}, not a number")
        exact = Decimal(repr(value)) + 0
        whole, _, places = format(exact, "f").lstrip("-").partition(".")
        digits = len(whole) if name == "integer" else len(whole) + len(places.rstrip("0"))
        if digits > (_WIDEST_INTEGER if name == "integer" else EXACT):
            raise UsageError(f"{key} at {place} is {brief(value)}, which has too many digits")
        bounds.append(Bound(exact, key == inclusive))
    if not bounds:
        return None
    tighter = max if inclusive == "minimum" else min
    return tighter(bounds, key=lambda bound: (bound.value, bound.inclusive != (tighter is max)))


def _range(keywords: _Schema, what: str, cap: int, place: str) -> tuple[int, int | None]:
    """What minLength and maxLength say, or minItems and maxItems; never more than `cap`."""
    least, most = count(keywords, f"min{what}", place), count(keywords, f"max{what}", place)
    if least is not None and least > cap:
        raise UsageError(f"min{what} at {place} is {least:,}; at most {cap:,} is supported")
    return least or 0, most if most is None else min(most, cap)
