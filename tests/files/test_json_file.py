"""JSON files from anywhere: what is wrong with one is said in a sentence that names it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dots1_local.errors import UsageError
from dots1_local.files.json_file import Fields, read_document

GOOD: dict[str, Any] = {"format": "thing", "version": 1, "size": 3}


def read(path: Path) -> Fields:
    return read_document(path, "thing", "description of a thing")


def test_reads_an_object_key_by_key(tmp_path: Path) -> None:
    content = {
        "size": 3, "share": 0.5, "none": 0, "name": "一", "on": True, "kind": "b",
        "list": [1], "inner": {"x": 1}, "absent": None, "comment": "anything",
    }  # fmt: skip
    path = tmp_path / "thing.json"
    path.write_text("\ufeff" + json.dumps(GOOD | content), encoding="utf-8")
    raw = read(path)
    assert (raw.integer("size"), raw.number("share"), raw.number("none", zero=True)) == (3, 0.5, 0)
    assert (raw.text("name"), raw.boolean("on"), raw.choice("kind", "abc")) == ("一", True, "b")
    assert (raw.items("list"), raw.given("absent"), raw.given("comment")) == ([1], False, True)
    inner = raw.group("inner")
    assert inner.rest() == ["x"]
    assert inner.number("x") == 1
    inner.end()
    raw.ignore("comment")
    raw.end()


@pytest.mark.parametrize(
    ("take", "value", "says"),
    [
        (lambda raw: raw.integer("x"), 1.0, "has 1.0 as 'x', not an integer"),
        (lambda raw: raw.integer("x"), True, "has True as 'x'"),
        (lambda raw: raw.integer("x", 2, 5), 6, "an integer from 2 to 5"),
        (lambda raw: raw.number("x"), 0, "has 0 as 'x', not a positive number"),
        (lambda raw: raw.number("x", zero=True), -1, "has -1 as 'x'"),
        (lambda raw: raw.number("x"), float("inf"), "has inf as 'x'"),
        (lambda raw: raw.number("x"), float("nan"), "has nan as 'x'"),
        (lambda raw: raw.text("x"), "a\nb", "not a line of text"),
        (lambda raw: raw.text("x"), "a" * 5000, "not a line of text"),
        (lambda raw: raw.boolean("x"), 1, "not true or false"),
        (lambda raw: raw.choice("x", ["a", "b"]), "c", "not one of a, b"),
        (lambda raw: raw.choice("x", ["a", "b"]), ["a"], "not one of a, b"),
        (lambda raw: raw.items("x", 1), [1, 2], "not a list"),
        (lambda raw: raw.group("x"), [], "thing, 'x', is .*, not a JSON object"),
        (lambda raw: raw.take("y"), 1, "thing has no 'y'"),
        (lambda raw: raw.end(), 1, "thing has an unknown key 'x'"),
    ],
)
def test_names_what_is_wrong(take: Callable[[Fields], Any], value: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        take(Fields({"x": value}, "thing"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no description of a thing"),
        ("[]", "is no description of a thing"),
        ("[" * 100_000, "is no description of a thing"),
        ('{"format": "other"}', "is no description of a thing"),
        ('{"format": "thing", "version": 2}', "of another version"),
        ('{"format": "thing", "version": 1, "a": 1, "a": 2}', "it has 'a' twice"),
        (b"\xff\xfe", "is no description of a thing"),
    ],
)
def test_refuses_other_files(text: str | bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UsageError, match=rf"file\.json .*{says}|file\.json {says}"):
        read(path)


def test_refuses_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*: No such file"):
        read(tmp_path / "none.json")
    with pytest.raises(UsageError, match="is not a file"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is not a file"):
        read(tmp_path / "pipe")
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="too large"):
        read(huge)
