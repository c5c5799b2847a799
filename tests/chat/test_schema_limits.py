"""What schemas cannot say, and how large they may be."""

from typing import Any

import pytest

from dots1_local.chat.grammar import Grammar
from dots1_local.errors import UsageError
from tests.chat.grammars import ambiguous, parsed, thing

TEXT, WHOLE = {"type": "string"}, {"type": "integer"}


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        (3, "# is 3, not a schema"),
        ({"type": "text"}, "type at # is 'text', not one or several of null"),
        ({"type": []}, "no document at all"),
        (thing(a={"not": {}}), "the schema at #/properties/a has not, which is not supported"),
        ({"if": True, "then": True}, "has if and then"),
        ({"type": "array", "uniqueItems": True}, "has uniqueItems"),
        ({"type": "object", "patternProperties": {}}, "has patternProperties"),
        ({"type": "integer", "multipleOf": 2}, "has multipleOf"),
        ({"type": "string", "pattern": "a", "minLength": 1}, "has minLength with pattern"),
        ({"type": "string", "format": "uri"}, "format at # is 'uri', not one of those supported"),
        ({"enum": ["a"], "minLength": 1}, "has minLength with enum or const"),
        ({"enum": "a"}, "enum at # is 'a'"),
        ({"enum": []}, "no document at all"),
        ({"minLength": -1}, "minLength at # is -1"),
        ({"minLength": 5000}, "minLength at # is 5,000; at most 4,000"),
        ({"minLength": 3, "maxLength": 2}, "no document at all"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "no document at all"),
        ({"maximum": True}, "maximum at # is True, not a number"),
        ({"minimum": 1.5e-20}, "too many digits"),
        ({"minimum": 3, "maximum": 2}, "no document at all"),
        ({"items": [TEXT]}, "#/items is"),
        ({"properties": []}, "properties at # is"),
        ({"required": "a"}, "required at # is 'a'"),
        ({"anyOf": []}, "anyOf at # is"),
        ({"allOf": {}}, "allOf at # is"),
        ({"$ref": "https://example.org/s"}, "$ref at # is 'https://example.org/s'"),
        ({"$ref": "#/$defs/a"}, "$ref at # is to '#/$defs/a', which is not there"),
        ({"$ref": "#"}, "no document at all"),
        ({"allOf": [{"$ref": "#"}, TEXT]}, "never ends"),
        (thing(["a"], a={"$ref": "#"}), "no document at all"),
        ({"oneOf": [WHOLE, {"type": "number"}]}, "oneOf at #: a document may fit both 0 and 1"),
        ({"oneOf": [thing(a=WHOLE), thing(b=WHOLE)]}, "may fit both"),
        ({"oneOf": [thing(["t"], t={"const": 1}), thing(t={"const": 2})]}, "may fit both"),
        ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "both have pattern"),
        (thing(["a"], **{"a": False}), "no document at all"),
        ({"const": float("nan")}, "not JSON"),
        ({"const": "\ud800"}, "not JSON"),
        ({"const": "x" * 300_000}, "at most 262,144"),
    ],
)
def test_what_is_not_supported_is_one_sentence(schema: Any, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        Grammar.of_json_schema(schema)
    assert sentence in str(error.value)


def nested(depth: int) -> Any:
    schema: Any = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def in_each_other(keyword: str, count: int = 60) -> dict[str, Any]:
    """Each definition has the next one twice: 2 ** 60 in all."""
    names = [f"d{n}" for n in range(count)]
    parts = {
        name: {keyword: [{"$ref": f"#/$defs/d{n}"}] * 2} for n, name in enumerate(names, 1)
    } | {f"d{count}": TEXT}
    return {"$defs": parts, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(a|b)*a(a|b){20}$"},
        {"type": "string", "pattern": "((a{1000}){1000}){1000}"},
        {"type": "array", "prefixItems": [{"type": "null"}] * 5001},
        {"anyOf": [{"items": {"$ref": "#"}}, {"items": {"$ref": "#"}, "minItems": 1}]},
        thing(**{f"p{n}": TEXT for n in range(3000)}),
        {"enum": [chr(0x4E00 + n) + str(n) for n in range(300)]},
        {"items": [{"type": "integer", "minimum": n} for n in range(3000)]},
        in_each_other("allOf"),
        nested(5000),
    ],
)
def test_what_would_take_llama_cpp_too_long_is_refused(schema: Any) -> None:
    with pytest.raises(UsageError):
        Grammar.of_json_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": ".*.*.*=.*.*.*=.*"},
        {"type": "string", "pattern": "^((a*)*)*(x+x+)+y$"},
        {"type": "string", "maxLength": 10**9},
        {"items": {"items": {"maxItems": 10**9}, "maxItems": 900}, "maxItems": 900},
        thing(**{f"property_{n}": TEXT for n in range(150)}),
        {"enum": [f"value {n}" for n in range(4000)]},
        {"anyOf": [thing(["name"], **{"name": TEXT, f"x{n}": TEXT}) for n in range(60)]},
        {"anyOf": [{}, TEXT, {"items": {"items": {}}}, thing(a={"type": "null"})]},
        in_each_other("prefixItems"),
        in_each_other("anyOf"),
        nested(200),
    ],
)
def test_what_looks_ambiguous_is_made_plain(schema: Any) -> None:
    assert ambiguous(parsed(Grammar.of_json_schema(schema))) == []
