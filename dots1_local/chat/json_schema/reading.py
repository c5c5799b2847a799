"""Reading a JSON schema: keywords checked, references followed, allOf merged into one schema."""

from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

from dots1_local.errors import UsageError
from dots1_local.files.json_file import brief

__all__ = ["ANNOTATIONS", "Reader", "count", "unsupported"]

ANNOTATIONS = frozenset(
    {
        "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default",
        "examples", "example", "deprecated", "readOnly", "writeOnly", "discriminator",
        "contentEncoding", "contentMediaType",
    }
)  # fmt: skip
_MOST_MERGED = 5000  # merges, so that an allOf that contains itself comes to an end
_LARGEST = ("minLength", "minItems", "minimum", "exclusiveMinimum")
_SMALLEST = ("maxLength", "maxItems", "maximum", "exclusiveMaximum")

_Schema = dict[str, Any]


class Reader:
    """The whole schema, in which references are looked up."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._merged = 0

    def referred(self, reference: Any, place: str) -> Any:
        """What a local reference such as "#/$defs/node" refers to.

        Raises:
            UsageError: it is not local, or refers to nothing.
        """
        if not isinstance(reference, str) or not (reference + "/").startswith("#/"):
            raise UsageError(f"$ref at {place} is {brief(reference)}; #/$defs/NAME is supported")
        found = self._root
        for part in unquote(reference).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                raise UsageError(f"$ref at {place} is to {brief(reference)}, which is not there")
        return found

    def flat(self, schema: Any, place: str) -> _Schema | bool:
        """The schema without annotations and allOf, and with $ref only if it is nothing else.

        Raises:
            UsageError: it is no schema, or its parts cannot be merged.
        """
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise UsageError(f"{place} is {brief(schema)}, not a schema")
        rest = {name: value for name, value in schema.items() if name not in ANNOTATIONS}
        parts = rest.pop("allOf", [])
        if not isinstance(parts, list):
            raise UsageError(f"allOf at {place} is {brief(parts)}, not a list of schemas")
        reference = {name: rest.pop(name) for name in ("$ref",) if name in rest}
        wholes: list[_Schema | bool] = [each for each in (rest, reference) if each]
        wholes += [self.flat(part, f"{place}/allOf/{n}") for n, part in enumerate(parts)]
        found: _Schema | bool = wholes[0] if wholes else {}
        for whole in wholes[1:]:
            found = self.merged(found, whole, place)
        return found

    def followed(self, schema: Any, place: str) -> _Schema | bool:
        """The flat schema, with a reference replaced by what it refers to."""
        found = self.flat(schema, place)
        while isinstance(found, dict) and "$ref" in found:
            self._count(place)
            found = self.flat(self.referred(found["$ref"], place), found["$ref"])
        return found

    def merged(self, one: Any, other: Any, place: str) -> _Schema | bool:
        """A schema that allows what both allow.

        Raises:
            UsageError: they share a keyword that cannot be merged.
        """
        self._count(place)
        one, other = self.followed(one, place), self.followed(other, place)
        if isinstance(one, bool) or isinstance(other, bool):
            return other if one is True else one if other is True else False
        both = {**one, **other}
        for name in one.keys() & other.keys():
            both[name] = self._both(name, one[name], other[name], place)
        if "properties" in both or "additionalProperties" in both:
            both.update(_properties(one, other))
        if ("items" in one) != ("items" in other) and "prefixItems" in both:
            raise UsageError(f"the schemas of allOf at {place} have items and prefixItems apart")
        both.pop("nullable", None)
        return both

    def _both(self, name: str, one: Any, other: Any, place: str) -> Any:
        if one == other:
            return one
        if name in ("properties", "additionalProperties", "nullable"):
            return one  # `merged` sets the first two afterwards
        if name in _LARGEST and _numbers(one, other):
            return max(one, other)
        if name in _SMALLEST and _numbers(one, other):
            return min(one, other)
        if name == "required" and isinstance(one, list) and isinstance(other, list):
            return [*one, *(each for each in other if each not in one)]
        if name == "type":
            return _types(one, other)
        raise UsageError(
            f"the schemas that are one at {place} (allOf, or anyOf beside other keywords) both "
            f"have {name}, which is not supported"
        )

    def _count(self, place: str) -> None:
        self._merged += 1
        if self._merged > _MOST_MERGED:
            raise UsageError(f"the schema at {place} is made of too many others, or of itself")


def count(schema: _Schema, name: str, place: str) -> int | None:
    """The value of a keyword such as maxItems; None if it is not there.

    Raises:
        UsageError: it is no whole number from 0 up.
    """
    value = schema.get(name)
    if name in schema and (type(value) is not int or value < 0):
        raise UsageError(f"{name} at {place} is {brief(value)}, not a whole number from 0 up")
    return value


def unsupported(names: Iterable[str], place: str) -> UsageError:
    """The refusal of keywords."""
    return UsageError(f"the schema at {place} has {' and '.join(names)}, which is not supported")


def _numbers(*values: Any) -> bool:
    return all(type(value) in (int, float) for value in values)


def _types(one: Any, other: Any) -> list[Any]:
    """The types in both; an integer is a number too."""
    ones, others = ([each] if isinstance(each, str) else each for each in (one, other))
    if not isinstance(ones, list) or not isinstance(others, list):
        raise UsageError(f"type is {brief(other)}, not a type or a list of types")
    shared = [each for each in ones if each in others]
    for some, rest in ((ones, others), (others, ones)):
        if "integer" in some and "number" in rest and "integer" not in shared:
            shared.append("integer")
    return shared


def _properties(one: _Schema, other: _Schema) -> _Schema:
    """The properties of both, where each has to satisfy both schemas, and so do further ones."""
    sides = [
        (side.get("properties", {}), side.get("additionalProperties")) for side in (one, other)
    ]
    if not all(isinstance(named, dict) for named, _ in sides):
        raise UsageError("properties is not an object of schemas")
    properties = {}
    for name in {**sides[0][0], **sides[1][0]}:
        said = [named.get(name, further) for named, further in sides]
        said = [each for each in said if each is not None]
        properties[name] = said[0] if len(said) == 1 or said[0] == said[1] else {"allOf": said}
    further = [each for _, each in sides if each is not None]
    found: _Schema = {"properties": properties} if properties else {}
    if further:
        found["additionalProperties"] = (
            further[0] if len(further) == 1 or further[0] == further[1] else {"allOf": further}
        )
    return found
