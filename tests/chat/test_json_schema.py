"""Generated schemas: answers within their grammars are valid, and valid documents pass.

The judges are the matcher that constrains answers, and the `jsonschema` library.
"""

import json
import random
import re
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from tests.chat.conftest import Compile
from tests.chat.grammars import accepts, written

LAYOUTS: list[dict[str, Any]] = [
    {}, {"separators": (",", ":")}, {"indent": 2}, {"indent": "\t"},
]  # fmt: skip
SLOW = settings(
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much,
    ],
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A schema and documents that it allows."""

    schema: Any
    documents: st.SearchStrategy[Any]


Cases = st.SearchStrategy[Case]
PATTERNS = [
    "^[a-c]{2,4}$", r"^\d+(\.\d\d)?$", "x", "^a|b$", r'^["\\/\n]*$', "^[^a-z]$", r"^\w+@\w+$",
    "^(ab|a)*c?$", r"^\S{1,3}$", "^.*中.?$", r"^(?:é|[一-九]{2})+?$", "^$",
]  # fmt: skip
# llguidance writes DEL as it is in names, and escaped in texts; JSON allows both.
CHARACTERS = st.characters(codec="utf-8", exclude_characters="\x7f")
PLAIN = st.text(CHARACTERS, max_size=8)
PLAINER = st.characters(codec="utf-8", exclude_characters='"\\\x7f', min_codepoint=32)
SCALARS = st.none() | st.booleans() | st.integers(-99, 999) | st.sampled_from([0.5, -1.25]) | PLAIN


@st.composite
def whole_numbers(draw: st.DrawFn) -> Case:
    low, high = sorted(draw(st.tuples(*[st.integers(-20_000, 20_000)] * 2)))
    low_name = draw(st.sampled_from(["minimum", "exclusiveMinimum"]))
    high_name = draw(st.sampled_from(["maximum", "exclusiveMaximum"]))
    least, most = low + (low_name != "minimum"), high - (high_name != "maximum")
    assume(least <= most)
    bounds = draw(st.sampled_from([{low_name: low, high_name: high}, {low_name: low}, {}]))
    most = most if high_name in bounds else 10**17
    least = least if bounds else -(10**17)
    return Case({"type": "integer", **bounds}, st.integers(least, most))


def short(value: float) -> float:
    """The number as llguidance writes it at a bound: 5, not 5.0."""
    return int(value) if value.is_integer() else value


@st.composite
def numbers(draw: st.DrawFn) -> Case:
    low, high = sorted(draw(st.tuples(*[st.integers(-20_000, 20_000)] * 2)))
    assume(low < high)
    kind = draw(st.integers(0, 3))
    if kind == 0:
        some = st.floats(-1e99, 1e99).filter(lambda value: value == 0 or abs(value) > 1e-99)
        return Case({"type": "number"}, some)
    between = st.integers(low * 100, high * 100).map(lambda value: short(value / 10_000))
    if kind == 1:
        return Case({"type": "number", "minimum": low / 100, "maximum": high / 100}, between)
    if kind == 2:
        above = st.integers(1, 10**9).map(lambda value: low / 100 + value / 1000)
        assume(low >= 0)
        return Case(
            {"type": "number", "minimum": low / 100},
            above.map(lambda value: short(round(value, 5))),
        )
    assume(high - low >= 100 or (low % 100 and high % 100))  # others are refused
    inside = between.filter(lambda value: low / 100 < value < high / 100)
    bounds = {"exclusiveMinimum": low / 100, "exclusiveMaximum": high / 100}
    return Case({"type": "number", **bounds}, inside)


@st.composite
def strings(draw: st.DrawFn) -> Case:
    least, more = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    if draw(st.booleans()):
        pattern = draw(st.sampled_from(PATTERNS))
        exact = re.compile(pattern.replace("$", r"\Z"), re.ASCII)
        some = st.from_regex(exact).filter(lambda text: not set(text) & set("\r\u2028\u2029\x7f"))
        if "\\S" in pattern or "." in pattern:
            some = some.filter(lambda text: not re.search(r"\s|[\x1c-\x1f]", text))
        return Case({"type": "string", "pattern": pattern}, some)
    text = st.text(CHARACTERS, min_size=least, max_size=least + more)
    bounds = draw(st.sampled_from([{"minLength": least, "maxLength": least + more}, {}]))
    return Case({"type": "string", **bounds}, text)


@st.composite
def listed(draw: st.DrawFn) -> Case:
    values = draw(st.lists(SCALARS | st.lists(SCALARS, max_size=2), min_size=1, max_size=6))
    return Case({"enum": values}, st.sampled_from(values))


def arrays(inner: Cases) -> Cases:
    @st.composite
    def made(draw: st.DrawFn) -> Case:
        first, rest = draw(st.lists(inner, max_size=2)), draw(inner)
        least, more = draw(st.integers(0, 3)), draw(st.integers(0, 3) | st.none())
        schema = {"type": "array", "items": rest.schema, "minItems": least}
        schema |= {"prefixItems": [each.schema for each in first]} if first else {}
        schema |= {} if more is None else {"maxItems": least + more}
        longest = least + (3 if more is None else more)
        size = draw(st.integers(least, longest))
        places = [first[at] if at < len(first) else rest for at in range(size)]
        return Case(schema, st.tuples(*(each.documents for each in places)).map(list))

    return made()


def objects(inner: Cases) -> Cases:
    @st.composite
    def made(draw: st.DrawFn) -> Case:
        named = draw(st.dictionaries(PLAIN, inner, max_size=4))
        required = [name for name in named if draw(st.booleans())]
        further = draw(st.none() | st.just(False) | inner)
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: case.schema for name, case in named.items()},
            "required": required,
        }
        others: st.SearchStrategy[dict[str, Any]] = st.just({})
        if isinstance(further, Case):
            schema["additionalProperties"] = further.schema
            names = st.text(PLAINER, max_size=4).filter(lambda name: name not in named)
            others = st.dictionaries(names, further.documents, max_size=2)
        elif further is False or not named:
            schema["additionalProperties"] = False

        @st.composite
        def documents(draw: st.DrawFn) -> dict[str, Any]:
            kept = [name for name in named if name in required or draw(st.booleans())]
            return {name: draw(named[name].documents) for name in kept} | draw(others)

        return Case(schema, documents())

    return made()


def alternatives(inner: Cases) -> Cases:
    def made(parts: list[Case]) -> Case:
        schema = {"anyOf": [each.schema for each in parts]}
        return Case(schema, st.one_of([each.documents for each in parts]))

    return st.lists(inner, min_size=1, max_size=3).map(made)


SIMPLE = (
    whole_numbers()
    | numbers()
    | strings()
    | listed()
    | st.just(Case({"type": ["boolean", "null"]}, st.booleans() | st.none()))
    | st.just(Case({}, SCALARS | st.lists(SCALARS) | st.dictionaries(PLAIN, SCALARS)))
)
CASES = st.recursive(
    SIMPLE, lambda inner: arrays(inner) | objects(inner) | alternatives(inner), max_leaves=6
)


@SLOW
@given(case=CASES, seed=st.integers(0, 99))
def test_written_documents_are_valid(compiled: Compile, case: Case, seed: int) -> None:
    grammar, rng = compiled(case.schema), random.Random(seed)
    valid = Draft202012Validator(case.schema)
    for text in (written(grammar, rng) for _ in range(5)):
        if text is not None:
            valid.validate(json.loads(text))


@SLOW
@given(case=CASES, data=st.data(), layout=st.sampled_from(LAYOUTS))
def test_valid_documents_pass(
    compiled: Compile, case: Case, data: st.DataObject, layout: dict[str, Any]
) -> None:
    document = data.draw(case.documents)
    valid = Draft202012Validator(case.schema)
    assume(valid.is_valid(document))  # a decimal may round to what is out of bounds
    grammar = compiled(case.schema)
    text = json.dumps(document, ensure_ascii=False, **layout)
    assert accepts(grammar, text)
    # A text almost the same is refused, or valid too.
    at = data.draw(st.integers(0, len(text)))
    other = text[:at] + data.draw(st.sampled_from(['"', "0", ",", "]", "}", "a", " ", "-", ""]))
    other += text[at + data.draw(st.integers(0, 1)) :]
    if accepts(grammar, other):
        valid.validate(json.loads(other))
