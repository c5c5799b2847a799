"""Grammars of JSON schemas: keywords, patterns and formats one by one."""

import json
import random
from datetime import date, time
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from uuid import UUID

import pytest
from jsonschema import Draft202012Validator

from dots1_local.chat.grammar import Grammar
from dots1_local.engine.engine import Engine
from tests.chat.conftest import Compile
from tests.chat.grammars import accepts, thing, written
from tests.chat.schema_features import PAGE, documented, table

TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
NODE, ZERO = {"$ref": "#/$defs/node"}, {"const": 0}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "null"}, ["null"], ["", "nul", "nulll", " null", "null "]),
        ({"type": "boolean"}, ["true", "false"], ["True", "1"]),
        (True, ["[1,{}]"], ["[1,{]"]),
        ({}, ['"x"', "-0.5e+7", "[ ]", "{ }"], ["01", "1.", "+1", ".5", "1e", "[1,]", "{1:2}"]),
        ({"type": "object"}, ["{}", '{"a":1,"a":2}'], ["[]", '{"a"}', '{"a"  :1}']),
        ({"type": ["integer", "null"]}, ["-3", "null"], ["1.0", '"3"']),
        (WHOLE, ["0", "-0", "9" * 18], ["00", "1e3", "1.0"]),
        (
            {"minimum": 3, "maximum": 1234},
            ["3", "3.0", "10", "999.99", "1234", "1234.000"],
            ["2", "2.99", "1234.1", "1235", "-3", "1e2", "03"],
        ),
        (
            {"type": "integer", "exclusiveMinimum": -12, "exclusiveMaximum": 3.5},
            ["-11", "-1", "0", "3"],
            ["-12", "4", "-00", "-111"],
        ),
        ({"exclusiveMaximum": 1}, ["-5", "0", "0.99999999999999"], ["1", "1.0", "1.5"]),
        ({"minimum": -2.25, "maximum": -0.5}, ["-2.25", "-1", "-0.50"], ["-2.251", "-0.4", "0"]),
        (
            TEXT,
            ['"\\u001f\\n\\t\\b\\f\\r\\\\\\"é"'],
            ['"\n"', '"\\ud83d"', '"\\x"', '"\\ude00"', '"a'],
        ),
        (
            {"minLength": 2, "maxLength": 3},
            ['"中文"', '"\\n\\u0001中"', '"😀😀😀"'],
            ['"a"', '"abcd"'],
        ),
        ({"enum": ["a", "ab", 1, 12, None]}, ['"a"', '"ab"', "12", "null"], ['"b"', "2", '"abc"']),
        ({"type": "string", "enum": ["a", 1]}, ['"a"'], ["1"]),
        ({"enum": [1, True], "const": True}, ["true"], ["1"]),
        ({"const": {"a": [1, {}]}}, ['{"a":[1, {}]}', '{\n "a": [1, {}]\n}'], ['{"a":[1]}']),
        (
            thing(["b"], a=WHOLE, b=TEXT, c={"type": "null"}),
            ['{"b":""}', '{"a": 1, "b": "x"}', '{"b":"","c":null}'],
            ["{}", '{"a":1}', '{"b":"","a":1}', '{"b":"",}', '{"b":"","d":1}', '{,"b":""}'],
        ),
        (
            {**thing(["a"], a=WHOLE, ab=WHOLE), "additionalProperties": TEXT},
            ['{"a":1,"b":"","ac":""}', '{"a":1,"":"x"}'],
            ['{"a":1,"a":""}', '{"a":1,"ab":""}', '{"a":1,"b":1}'],
        ),
        ({"type": "object", "required": ["x"]}, ['{"x":[]}', '{"x":1,"y":2}'], ["{}", '{"y":2}']),
        ({**thing(a=False, b=WHOLE)}, ["{}", '{"b":1}'], ['{"a":1}']),
        (
            {"items": WHOLE, "minItems": 1, "maxItems": 3},
            ["[1]", "[1,2,3]", "[\n\t1,\n\t2\n]"],
            ["[]", "[1,2,3,4]", "[1  ,2]", "[1,,2]", '["1"]'],
        ),
        ({"prefixItems": [WHOLE, TEXT], "items": False}, ["[]", '[1,"a"]'], ['[1,"a",2]', '["a"]']),
        ({"type": "array", "maxItems": 0}, ["[]", "[ ]"], ["[1]"]),
        ({"anyOf": [WHOLE, {"type": "number"}, TEXT]}, ["1", "1.5", '"x"'], ["true"]),
        (
            {"anyOf": [thing(["a"], a=WHOLE, b=WHOLE), thing(["a"], a=TEXT, c=WHOLE)]},
            ['{"a":1,"b":2}', '{"a":"","c":2}'],
            ['{"a":"","b":2}', '{"a":1,"c":2}'],
        ),
        (
            {**thing(a=WHOLE, b=WHOLE), "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
            ['{"a":1}', '{"b":1}', '{"a":1,"b":1}'],
            ["{}"],
        ),
        ({"oneOf": [WHOLE, {"type": "null"}]}, ["1", "null"], ["1.5"]),
        (
            {"oneOf": [thing(["t"], t={"const": "a"}, x=WHOLE), thing(["t"], t={"enum": [*"bc"]})]},
            ['{"t":"a","x":1}', '{"t":"c"}'],
            ['{"t":"c","x":1}', '{"t":"d"}'],
        ),
        (
            {"allOf": [thing(["a"], a={"minimum": 2}), thing(["b"], a=WHOLE, b=TEXT)]},
            ['{"a":2,"b":""}'],
            ['{"a":1,"b":""}', '{"a":2.5,"b":""}', '{"a":2}'],
        ),
        (
            {"allOf": [{**thing(a=WHOLE), "additionalProperties": False}, thing(b=TEXT)]},
            ["{}", '{"a":1}'],
            ['{"b":""}'],
        ),
        ({"allOf": [TEXT]}, ['""'], ["1"]),
        ({"type": ["number", "null"], "allOf": [{"type": ["integer", "string"]}]}, ["1"], ["null"]),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": WHOLE}, "title": "T"}, ["1"], ["null"]),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"maximum": 9}}, "minimum": 8}, ["8", "9"], ["7"]),
        ({"properties": {"a": TEXT, "b": {"$ref": "#/properties/a"}}}, ['{"b":""}'], ['{"b":1}']),
        (
            {"$defs": {"node": thing(["v"], v=WHOLE, next={"anyOf": [NODE, ZERO]})}, **NODE},
            ['{"v":1}', '{"v":1,"next":{"v":2,"next":0}}'],
            ['{"v":1,"next":{}}'],
        ),
        ({"type": "array", "items": {"$ref": "#"}}, ["[[],[[]]]"], ["[1]"]),
        ({"type": "string", "nullable": True}, ['""', "null"], ["1"]),
        ({"type": "integer", "format": "int64", "default": 1, "description": "d"}, ["1"], ["null"]),
    ],
)  # fmt: skip
def test_keywords(compiled: Compile, schema: Any, good: list[str], bad: list[str]) -> None:
    grammar = compiled(schema)
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []
    valid = Draft202012Validator(schema)
    nullable = schema is not True and "nullable" in schema
    assert all(nullable or valid.is_valid(json.loads(text)) for text in good)


def test_a_recursive_alternative_that_never_ends_is_left_out(compiled: Compile) -> None:
    grammar = compiled({"anyOf": [{"$ref": "#"}, {"type": "null"}]})
    assert accepts(grammar, "null")
    assert not accepts(grammar, "[]")


def test_whitespace_has_an_end(compiled: Compile) -> None:
    grammar = compiled({"type": "object"})
    for gap in ("", " ", "\n", "\n" + " " * 32, "\n\t"):
        assert accepts(grammar, f'{{{gap}"a": [{gap}1,{gap}2{gap}]{gap}}}')
    for text in ("{  }", '{"a":  1}', "{\n" + " " * 33 + "}", "{\n\n}", "{}\n", " {}", "{\r\n}"):
        assert not accepts(grammar, text)


def test_any_object_is_any_object(engine: Engine) -> None:
    grammar = Grammar({"type": "object"}, engine)
    assert accepts(
        grammar, json.dumps({"a": [1, -2.5e7, True, None, {"b\n": "é"}]}, ensure_ascii=False)
    )
    assert not accepts(grammar, "[]")


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        ("^a|b$", ["a", "ax", "xb"], ["xa", "bx"]),
        ("b+", ["b", "xbbx", "\n b"], ["", "a"]),
        (r"^\d{2}-[A-F]?(x|yz){1,2}$", ["12-x", "12-Fyzx"], ["1-x", "12-G", "12-xxx", "١٢-x"]),
        (r"^[\w.-]+\.$", ["a_1-.."], [".", "é."]),
        (r"^\S\s$", ["é ", "a\t"], ["  ", "aa", "\u3000 "]),
        (r"^[^\d\]]$", ["a", "[", "é"], ["1", "]"]),
        (r"^\D\W$", ["a-"], ["1-", "aa"]),
        ("^.$", ["😀", '"', "\\"], ["\n", "ab"]),
        (r"^\x41\u4e2d\/\n$", ["A中/\n"], ["A中/n"]),
        ("^(?:a*)*?$", ["", "aaa"], ["b"]),
        ("^(|a)b]}$", ["b]}", "ab]}"], ["a"]),
        ("^[a-]$", ["a", "-"], ["b"]),
    ],
)
def test_patterns(compiled: Compile, pattern: str, good: list[str], bad: list[str]) -> None:
    grammar = compiled({"type": "string", "pattern": pattern})
    texts = [(text, json.dumps(text, ensure_ascii=False)) for text in (*good, *bad)]
    assert [text for text, shown in texts if accepts(grammar, shown)] == good


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("date", lambda text: date(2024, *map(int, text.split("-")[1:]))),
        ("time", lambda text: time.fromisoformat(text[:8].replace(":60", ":59"))),
        ("uuid", UUID),
        ("ipv4", IPv4Address),
        ("ipv6", IPv6Address),
        ("email", lambda text: text.split("@")[1]),
    ],
)
def test_formats(compiled: Compile, name: str, read: Any) -> None:
    grammar, rng = compiled({"type": "string", "format": name}), random.Random(0)
    for _ in range(100):
        if text := written(grammar, rng):
            read(json.loads(text))


def test_the_page_lists_what_is_supported(engine: Engine) -> None:
    assert documented(PAGE.read_text(encoding="utf-8")) == table(engine)
