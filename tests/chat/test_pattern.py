"""Patterns and formats of strings as grammars; llama.cpp and Python's own readers judge."""

import json
import random
from datetime import date, datetime, time
from ipaddress import IPv4Address
from typing import Any
from uuid import UUID

import pytest

from dots1_local.chat.grammar import Grammar
from dots1_local.errors import UsageError
from tests.chat.conftest import Judge
from tests.chat.grammars import derived, parsed


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        ("^a|b$", ["a", "ax", "xb"], ["xa", "bx"]),
        ("b+", ["b", "xbbx", "\n b"], ["", "a"]),
        (r"^\d{2}-[A-F]?(x|yz){1,2}$", ["12-x", "12-Fyzx"], ["1-x", "12-G", "12-xxx", "١٢-x"]),
        (r"^[\w.-]+\.$", ["a_1-.."], [".", "é."]),
        (r"^\S\s$", ["é ", "a\t"], ["  ", "aa", "\u3000 "]),
        (r"^[^\d\]]$", ["a", "["], ["1", "]", "é"]),
        (r"^\D\W$", ["a-"], ["1-", "aa"]),
        ("^.$", ["😀", '"', "\\"], ["\n", "\r", "\u2028", "ab"]),
        (r"^\x41\u4e2d\/\n$", ["A中/\n"], ["A中/n"]),
        ("^(?:a*)*?$", ["", "aaa"], ["b"]),
        ("^(|a)b]}$", ["b]}", "ab]}"], ["a"]),
        ("^[a-]$", ["a", "-"], ["b"]),
    ],
)
def test_patterns(judge: Judge, pattern: str, good: list[str], bad: list[str]) -> None:
    grammar = Grammar.of_json_schema({"type": "string", "pattern": pattern})
    texts = [(text, json.dumps(text, ensure_ascii=False)) for text in (*good, *bad)]
    assert [text for text, shown in texts if judge(grammar, shown)] == good


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("(?=a)", "'(?=a'"), ("(?P<n>a)", "'(?P<'"), (r"a\b", r"'\b'"), (r"(a)\1", r"'\1'"),
        (r"\p{L}", r"'\p'"), ("a**", "repetition of a repetition"), ("a++", "repetition"),
        ("a{3,2}", "nothing matches"), ("(a", "not closed"), ("a)", "a ) too many"),
        ("a^b", "'^' in this place"), ("(a$)", "'$' in it"), ("[b-a]", "ends before"),
        (r"[\d-z]", "range between classes"), ("[]", "empty class"), ("a\\", "an end where"),
        ("[a", "an end where"), ("*", "'*' in this place"), ("a{,2}", "'{' in this place"),
        (r"\ud800", "surrogate"), ("(" * 60, "51 deep"),
    ],
)  # fmt: skip
def test_other_patterns_are_refused(pattern: str, what: str) -> None:
    with pytest.raises(UsageError) as error:
        Grammar.of_json_schema({"properties": {"a": {"type": "string", "pattern": pattern}}})
    assert what in str(error.value)
    assert "at #/properties/a has" in str(error.value)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("date", date.fromisoformat),
        ("time", time.fromisoformat),
        ("date-time", datetime.fromisoformat),
        ("uuid", UUID),
        ("ipv4", IPv4Address),
        ("email", lambda text: text.split("@")[1]),
    ],
)
def test_formats(name: str, read: Any) -> None:
    rules = parsed(Grammar.of_json_schema({"type": "string", "format": name}))
    rng = random.Random(0)
    for _ in range(500):
        read(json.loads(derived(rules, rng)))


def test_leap_days(judge: Judge) -> None:
    grammar = Grammar.of_json_schema({"type": "string", "format": "date"})
    for year in range(1, 420):
        leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
        assert judge(grammar, f'"{year:04}-02-29"') == leap
