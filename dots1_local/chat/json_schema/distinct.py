"""oneOf demands that no document fits two of its schemas; this makes sure of it."""

from itertools import combinations
from typing import Any

from dots1_local.chat.json_schema.reading import Reader
from dots1_local.chat.json_schema.types import TYPES, has_type, same, types_of, types_written
from dots1_local.errors import UsageError

__all__ = ["check_distinct"]

_DEEPEST = 4

_Schema = dict[str, Any]


def check_distinct(reader: Reader, schemas: list[Any], place: str) -> None:
    """Make sure that no document written for one of the schemas is valid for another.

    Raises:
        UsageError: types, constants and required properties do not rule it out.
    """
    for (n, one), (m, other) in combinations(enumerate(schemas), 2):
        if not (
            _excluded(reader, one, other, place, 0) and _excluded(reader, other, one, place, 0)
        ):
            raise UsageError(
                f"oneOf at {place}: a document may fit both {n} and {m}; use anyOf, or tell them "
                "apart by type or by a required property of constant value"
            )


def _excluded(reader: Reader, written: Any, other: Any, place: str, depth: int) -> bool:
    """Whether what is written for one schema is never valid for the other."""
    written, other = reader.followed(written, place), reader.followed(other, place)
    if any(isinstance(each, dict) and each.get("nullable") for each in (written, other)):
        return False
    if written is False or other is False:
        return True
    if isinstance(written, bool) or isinstance(other, bool) or depth == _DEEPEST:
        return False
    values, allowed = _values(written), _values(other)
    if values is not None:
        return not any(_allowed(each, other, place) for each in values)
    types = _types(written, place)
    if allowed is not None and not any(has_type(v, name) for v in allowed for name in types):
        return True
    named = types_of(other, place)
    if named is not None and not any(_overlap(one, two) for one in types for two in named):
        return True
    return types == ("object",) and _by_properties(reader, written, other, place, depth)


def _by_properties(
    reader: Reader, written: _Schema, other: _Schema, place: str, depth: int
) -> bool:
    """Whether objects differ by what one always has and the other never, or by a constant."""
    has, may = written.get("required", []), written.get("properties", {})
    allowed, needed = other.get("properties", {}), other.get("required", [])
    if other.get("additionalProperties") is False and any(name not in allowed for name in has):
        return True
    closed = bool(may) and written.get("additionalProperties", False) is False
    if closed and any(name not in may and name not in has for name in needed):
        return True
    return any(
        name in may
        and name in allowed
        and _excluded(reader, may[name], allowed[name], place, depth + 1)
        for name in has
    )


def _values(schema: _Schema) -> list[Any] | None:
    """The values a schema lists; None if it lists none."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _allowed(value: Any, schema: _Schema, place: str) -> bool:
    """Whether a value may be valid."""
    listed, named = _values(schema), types_of(schema, place)
    return (listed is None or any(same(value, each) for each in listed)) and (
        named is None or any(has_type(value, name) for name in named)
    )


def _types(schema: _Schema, place: str) -> tuple[str, ...]:
    """The types that a document written for a schema may have."""
    if types_of(schema, place) is None and not schema.keys().isdisjoint(("anyOf", "oneOf")):
        return tuple(TYPES)
    return types_written(schema, place)


def _overlap(one: str, other: str) -> bool:
    return one == other or {one, other} == {"integer", "number"}
