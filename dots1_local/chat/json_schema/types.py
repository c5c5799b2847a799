"""The types of JSON values: their names and keywords, and which of them a value has."""

from collections.abc import Mapping
from typing import Any

from dots1_local.errors import UsageError
from dots1_local.files.json_file import brief

__all__ = ["TYPES", "has_type", "same", "types_of", "types_written"]

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")

TYPES: dict[str, tuple[str, ...]] = {
    "null": (),
    "boolean": (),
    "integer": _BOUNDS,
    "number": _BOUNDS,
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("prefixItems", "items", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
"""Each type's keywords."""

_PYTHON: dict[str, Any] = {
    "null": type(None), "boolean": bool, "number": int | float, "string": str, "array": list,
    "object": dict,
}  # fmt: skip
_ANY = ("null", "boolean", "number", "string", "array", "object")


def types_of(schema: Mapping[str, Any], place: str) -> tuple[str, ...] | None:
    """The types that a schema names; None if it names none.

    Raises:
        UsageError: one does not exist.
    """
    if "type" not in schema:
        return None
    names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    if not isinstance(names, list) or not all(isinstance(n, str) and n in TYPES for n in names):
        raise UsageError(
            f"type at {place} is {brief(schema['type'])}, not one or several of {', '.join(TYPES)}"
        )
    return tuple(dict.fromkeys(names))


def types_written(schema: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """The types to write: those that a schema names, else those it has keywords for, else all."""
    named = types_of(schema, place)
    if named is not None:
        return named
    meant = tuple(name for name in _ANY if any(keyword in schema for keyword in TYPES[name]))
    return meant or _ANY


def has_type(value: Any, name: str) -> bool:
    """Whether a value is of a type; 1.0 is an integer."""
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, _PYTHON[name])


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal in JSON, where true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return bool(one == other)
