"""JSON from anywhere: an error says what is wrong with it, and where."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest

from dots1_local.errors import UsageError
from dots1_local.files.json_file import JsonError, convert_json, parse_json, read_json


@dataclass(frozen=True)
class Part:
    size: Annotated[int, msgspec.Meta(ge=2, le=5)]
    share: float = 0.5
    kind: Literal["a", "b"] = "a"


class Thing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    parts: list[Part] = []
    on: bool = False
    kinds: dict[Literal["c", "d"], Literal["e", "f"]] = {}


@pytest.mark.parametrize("value", [None, True, 3, 0.5, "一", [1, [2]], {"a": {"b": "\U0001f600"}}])
def test_parses_what_the_standard_parser_does(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode("utf-8-sig")) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("NaN", "NaN"),
        ("[-Infinity]", "Infinity"),
        ("1e999", "1e999"),
        ('{"a": {"b": 1, "b": 1}}', "'b'"),
        ('["\\ud83d"]', "surrogate"),
        ("[" * 100_000, "deep"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_refuses_what_is_not_json_or_is_ambiguous(
    text: str | bytes, says: str, tmp_path: Path
) -> None:
    data = text.encode() if isinstance(text, str) else text
    with pytest.raises(JsonError, match=says):
        parse_json(data)
    path = tmp_path / "file.json"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=rf"file\.json .*description of a thing.*{says}"):
        read_json(path, "description of a thing")


def test_converts_to_the_types_it_is_given() -> None:
    raw = {"name": "x", "parts": [{"size": 2, "share": 1, "kind": "b"}, {"size": 5}]}
    assert convert_json(raw, Thing) == Thing("x", [Part(2, 1.0, "b"), Part(5)])


@pytest.mark.parametrize(
    ("change", "path", "reason"),
    [
        ({"name": 1}, "name", "expected str, got int"),
        ({"on": 1}, "on", "expected bool, got int"),
        ({"nome": "x"}, "", "nome"),
        ({"parts": {}}, "parts", "expected array, got object"),
        ({"parts": [{"size": 3}, {"size": True}]}, "parts[1].size", "expected int, got bool"),
        ({"parts": [{"size": "3"}]}, "parts[0].size", "expected int, got str"),
        ({"parts": [{"size": 6}]}, "parts[0].size", "<= 5"),
        ({"parts": [{}]}, "parts[0]", "size"),
        ({"parts": [{"size": 3, "kind": "c"}]}, "parts[0].kind", "expected one of a, b, got 'c'"),
        ({"kinds": {"c": "g"}}, "kinds[...]", "expected one of e, f, got 'g'"),
        ({"kinds": {"g": "e"}}, "key in kinds", "'g'"),
    ],
)
def test_names_the_field_that_is_wrong(change: dict[str, Any], path: str, reason: str) -> None:
    with pytest.raises(JsonError) as error:
        convert_json({"name": "x"} | change, Thing)
    assert error.value.path == path
    assert reason in error.value.reason
    assert str(error.value) == (f"{path}: " if path else "") + error.value.reason


def test_refuses_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.json: No such file"):
        read_json(tmp_path / "none.json", "thing")
    with pytest.raises(UsageError, match="not a file"):
        read_json(tmp_path, "thing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="pipe is not a file"):
        read_json(tmp_path / "pipe", "thing")
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match=r"huge\.json is too large"):
        read_json(huge, "thing")
