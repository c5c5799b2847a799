"""Schemas that are refused, and schemas that could take too much time, memory or stack."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dots1_local.errors import UsageError
from tests.chat.conftest import Compile
from tests.chat.grammars import thing

TEXT, WHOLE = {"type": "string"}, {"type": "integer"}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (3, ["3", "not an object"]),
        ([], ["not an object"]),
        (False, ["False"]),
        ({"type": "text"}, ["text"]),
        ({"type": []}, ["Unsatisfiable"]),
        (thing(a={"not": {}}), ["not"]),
        ({"if": True, "then": True}, ["if", "then"]),
        ({"type": "array", "uniqueItems": True}, ["uniqueItems"]),
        ({"type": "string", "format": "regex"}, ["regex"]),
        ({"type": "string", "pattern": "(?=a)"}, ["look-ahead"]),
        ({"type": "string", "pattern": "(a"}, ["unclosed group"]),
        ({"type": "string", "pattern": "(" * 3000 + ")" * 3000}, ["regex"]),
        ({"enum": "a"}, ["enum"]),
        ({"enum": []}, ["empty"]),
        ({"minLength": -1}, ["minLength"]),
        ({"type": "string", "minLength": 3, "maxLength": 2}, ["minLength"]),
        ({"type": "array", "minItems": 3, "maxItems": 2}, ["minItems"]),
        ({"maximum": True}, ["maximum"]),
        ({"type": "integer", "minimum": 3, "maximum": 2}, ["minimum"]),
        ({"properties": []}, ["properties"]),
        ({"required": "a"}, ["required"]),
        ({"anyOf": []}, ["anyOf"]),
        ({"allOf": {}}, ["allOf"]),
        ({"$ref": "https://example.org/s"}, ["https://example.org/s"]),
        ({"$ref": "#/$defs/a"}, ["/$defs/a"]),
        ({"$ref": "#"}, ["no text matches the schema"]),
        ({"oneOf": [WHOLE, {"type": "number"}]}, ["oneOf", "anyOf"]),
        (thing(["a"], a=False), ["required"]),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1, "multipleOf": 1e-30}, ["digits"]),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, ["0", "narrower"]),
        (
            {"type": "number", "allOf": [{"exclusiveMaximum": 0}, {"minimum": -0.5}]},
            ["0", "narrower"],
        ),
        ({"type": "number", "exclusiveMinimum": 10**400, "maximum": 0.5}, ["number"]),
        ({"const": float("nan")}, ["not JSON"]),
        ({"const": "\ud800"}, ["not JSON"]),
        ({"const": "x" * 300_000}, ["262,144"]),
        (thing(**{f"p{n}": TEXT for n in range(3000)}), ["items"]),
    ],
)
def test_a_refusal_says_why(compiled: Compile, schema: Any, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        compiled(schema)
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def nested(depth: int) -> Any:
    schema: Any = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def chained(part: Callable[[dict[str, str]], Any], length: int) -> dict[str, Any]:
    """Return definitions that each refer to the next one."""
    parts = {f"d{n}": part({"$ref": f"#/$defs/d{n + 1}"}) for n in range(length)}
    return {"$defs": {**parts, f"d{length}": TEXT}, "$ref": "#/$defs/d0"}


CHAINS: list[Callable[[dict[str, str]], Any]] = [
    lambda further: {"type": "array", "items": further},
    lambda further: {"allOf": [further, {"title": "a"}]},
    lambda further: {"anyOf": [further, WHOLE]},
    lambda further: thing(a=thing(b=further)),
    lambda further: {"additionalProperties": further},
]


@pytest.mark.parametrize("part", CHAINS)
def test_references_that_would_overflow_the_stack_are_refused(
    compiled: Compile, part: Callable[[dict[str, str]], Any]
) -> None:
    with pytest.raises(UsageError, match="levels deep"):
        compiled(chained(part, 1500))


@pytest.mark.parametrize(("depth", "words"), [(200, "recursion limit"), (5000, "too deeply")])
def test_deep_nesting_is_refused(compiled: Compile, depth: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        compiled(nested(depth))


@pytest.mark.parametrize("part", CHAINS)
def test_the_deepest_references_leave_stack_to_spare(
    compiled: Compile, part: Callable[[dict[str, str]], Any]
) -> None:
    with ThreadPoolExecutor(1) as pool:  # HTTP compiles in threads
        assert pool.submit(compiled, chained(part, 130)).result()


def twice(keyword: str, count: int = 60) -> dict[str, Any]:
    """Return definitions that each have the next one twice: 2 ** 60 in all."""
    return chained(lambda further: {keyword: [further] * 2}, count)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(a|b)*a(a|b){20}$"},
        {"type": "string", "pattern": "((a{1000}){1000}){1000}"},
        {"type": "string", "pattern": ".*.*.*=.*.*.*=.*"},
        {"type": "string", "pattern": "^((a*)*)*(x+x+)+y$"},
        {"allOf": [{"type": "string", "pattern": f".*{each}.{{20}}"} for each in "abcdefghij"]},
        {"type": "string", "maxLength": 10**9},
        {"items": {"items": {"maxItems": 10**9}, "maxItems": 900}, "maxItems": 900},
        {"type": "array", "prefixItems": [{"type": "null"}] * 5001},
        {"anyOf": [{"items": {"$ref": "#"}}, {"items": {"$ref": "#"}, "minItems": 1}]},
        {"anyOf": [{}, TEXT, {"items": {"items": {}}}, thing(a={"type": "null"})]},
        {"anyOf": [thing(["name"], **{"name": TEXT, f"x{n}": TEXT}) for n in range(60)]},
        {"allOf": [{"anyOf": [thing(**{f"a{i}{j}": TEXT}) for i in range(8)]} for j in range(8)]},
        thing(**{f"property_{n}": TEXT for n in range(150)}),
        {"enum": [f"value {n}" for n in range(4000)]},
        {"type": "integer", "multipleOf": 999_999_937},
        twice("allOf"),
        twice("anyOf"),
        twice("prefixItems"),
        nested(60),
    ],
)
def test_a_schema_is_refused_or_its_answers_take_little_time(
    compiled: Compile, schema: Any
) -> None:
    begun = time.monotonic()
    try:
        matcher = compiled(schema).matcher()
    except UsageError:
        return
    finally:
        assert time.monotonic() - begun < 5
    for _ in range(50):
        begun = time.monotonic()
        allowed = np.flatnonzero(matcher.mask())
        if not allowed.size or not matcher.accept(int(allowed[0])):
            break
        assert time.monotonic() - begun < 1


KEYWORDS = st.sampled_from(
    [
        "type", "enum", "const", "properties", "required", "additionalProperties", "items",
        "prefixItems", "minItems", "minLength", "pattern", "format", "minimum", "exclusiveMaximum",
        "multipleOf", "anyOf", "allOf", "oneOf", "$ref", "$defs", "$id", "nullable", "x-guidance",
    ]
)  # fmt: skip
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["string", "number", "object", "array", "#", "#/$defs/a", "^(?i)a{2,3}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS, inner, max_size=4),
    max_leaves=12,
)


@given(schema=st.dictionaries(KEYWORDS, VALUES, max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_value_is_a_grammar_or_one_sentence(compiled: Compile, schema: Any) -> None:
    problem = ""
    try:
        compiled(schema)
    except UsageError as error:
        problem = str(error)
    assert "\n" not in problem
