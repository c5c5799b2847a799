"""Which features of JSON Schema constrain an answer, found by trying each of them.

`python -m tests.chat.schema_features` writes the result into docs/serve.md, between two markers.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dots1_local.chat.grammar import Grammar
from dots1_local.engine.engine import Engine
from dots1_local.errors import UsageError
from tests.chat.grammars import accepts, thing
from tests.helpers import write_random_gguf

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
BEGIN = "<!-- schema features, by python -m tests.chat.schema_features: begin -->\n"
END = "<!-- schema features: end -->"
TEXT, WHOLE = {"type": "string"}, {"type": "integer"}

# Feature, a schema that has it, and a JSON text that the schema rules out.
FEATURES: list[tuple[str, Any, str]] = [
    ("`type`", WHOLE, '"a"'),
    ("`type` (list)", {"type": ["integer", "null"]}, '"a"'),
    ("`enum`", {"enum": [1, "a", None, [True]]}, '"b"'),
    ("`const`", {"const": {"a": 1}}, '{"a":2}'),
    ("`properties`", thing(a=WHOLE), '{"a":"b"}'),
    ("`required`", {"type": "object", "required": ["a"]}, "{}"),
    ("`additionalProperties`", {"type": "object", "additionalProperties": WHOLE}, '{"a":"b"}'),
    ("`patternProperties`", {"type": "object", "patternProperties": {"^a": WHOLE}}, '{"a":"b"}'),
    ("`minProperties`", {"type": "object", "minProperties": 1}, "{}"),
    ("`maxProperties`", {"type": "object", "maxProperties": 0}, '{"a":1}'),
    ("`propertyNames`", {"type": "object", "propertyNames": {"const": "b"}}, '{"a":1}'),
    ("`dependentRequired`", {"type": "object", "dependentRequired": {"a": ["b"]}}, '{"a":1}'),
    ("`dependentSchemas`", {"type": "object", "dependentSchemas": {"a": False}}, '{"a":1}'),
    ("`unevaluatedProperties`", {"type": "object", "unevaluatedProperties": False}, '{"a":1}'),
    ("`items`", {"type": "array", "items": WHOLE}, '["a"]'),
    ("`items` (list)", {"type": "array", "items": [WHOLE]}, '["a"]'),
    ("`prefixItems`", {"type": "array", "prefixItems": [WHOLE]}, '["a"]'),
    ("`minItems`", {"type": "array", "minItems": 1}, "[]"),
    ("`maxItems`", {"type": "array", "maxItems": 1}, "[1,2]"),
    ("`uniqueItems`", {"type": "array", "uniqueItems": True}, "[1,1]"),
    ("`contains`", {"type": "array", "contains": WHOLE}, "[]"),
    ("`unevaluatedItems`", {"type": "array", "unevaluatedItems": False}, "[1]"),
    ("`minLength`", {**TEXT, "minLength": 2}, '"a"'),
    ("`maxLength`", {**TEXT, "maxLength": 1}, '"ab"'),
    ("`pattern`", {**TEXT, "pattern": "^a+$"}, '"b"'),
    ("`pattern` with lengths", {**TEXT, "pattern": "^a+$", "minLength": 2}, '"a"'),
    ("`pattern` with `\\p{L}`", {**TEXT, "pattern": r"^\p{L}$"}, '"1"'),
    ("`pattern` with `(?=a)`", {**TEXT, "pattern": "^(?=a)"}, '"b"'),
    ("`pattern` with `\\b`", {**TEXT, "pattern": r"^a\b"}, '"ab"'),
    ("`pattern` with `(a)\\1`", {**TEXT, "pattern": r"^(a)\1$"}, '"a"'),
    ("`pattern` with `^` inside", {**TEXT, "pattern": "a^b"}, '"ab"'),
    *(
        (f"`format` {name}", {**TEXT, "format": name}, '" "')
        for name in (
            "date", "time", "date-time", "duration", "uuid", "email", "hostname", "ipv4", "ipv6",
            "uri", "iri", "uri-reference", "regex", "json-pointer",
        )
    ),
    (
        "`format` uri with lengths (pydantic's `HttpUrl`)",
        {**TEXT, "format": "uri", "minLength": 1, "maxLength": 2083},
        '" "',
    ),
    ("`minimum`", {**WHOLE, "minimum": 3}, "2"),
    ("`maximum`", {**WHOLE, "maximum": 3}, "4"),
    ("`exclusiveMinimum`", {"type": "number", "exclusiveMinimum": 3}, "3"),
    ("`exclusiveMaximum`", {"type": "number", "exclusiveMaximum": 3}, "3"),
    (
        "`exclusiveMinimum` 0 with `maximum` 0.5, and the like",
        {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
        "0",
    ),
    ("`multipleOf`", {**WHOLE, "multipleOf": 3}, "4"),
    ("`anyOf`", {"anyOf": [WHOLE, {"type": "null"}]}, '"a"'),
    ("`allOf`", {"allOf": [{**WHOLE, "minimum": 3}, {"maximum": 9}]}, "2"),
    ("`oneOf` of different types", {"oneOf": [WHOLE, TEXT]}, "null"),
    (
        "`oneOf` by the string in a property",
        {"oneOf": [thing(["t"], t={"const": "a"}, x=WHOLE), thing(["t"], t={"const": "b"})]},
        '{"t":"b","x":1}',
    ),
    (
        "`oneOf` by the number in a property",
        {"oneOf": [thing(["t"], t={"const": 1}), thing(["t"], t={"const": 2})]},
        '{"t":3}',
    ),
    ("`oneOf` of schemas that overlap", {"oneOf": [WHOLE, {"type": "number"}]}, "1"),
    ("`not`", {"not": WHOLE}, "1"),
    ("`if`, `then`, `else`", {"if": WHOLE, "then": {"minimum": 3}}, "1"),
    ("`$ref` to `$defs`", {"$ref": "#/$defs/a", "$defs": {"a": WHOLE}}, '"a"'),
    ("`$ref` to a recursive schema", {"type": "array", "items": {"$ref": "#"}}, "[1]"),
    ("`$ref` to another document", {"$ref": "https://example.org/schema"}, "1"),
    ("`$anchor`", {"$ref": "#a", "$defs": {"a": {**WHOLE, "$anchor": "a"}}}, '"a"'),
    ("`$dynamicRef`", {"$dynamicRef": "#a", "$defs": {"a": {"$dynamicAnchor": "a"}}}, "[1"),
    ("OpenAPI's `nullable`", {**TEXT, "nullable": True}, "1"),
    ("`contentEncoding`", {**TEXT, "contentEncoding": "base64"}, '"!"'),
    ("`contentMediaType`", {**TEXT, "contentMediaType": "application/json"}, '"{"'),
    ("unknown keywords", {**TEXT, "maximumLength": 1}, '"ab"'),
]  # fmt: skip


def table(engine: Engine) -> str:
    """Return what docs/serve.md says about every feature."""
    outcomes = [(name, _outcome(schema, text, engine)) for name, schema, text in FEATURES]
    enforced = ", ".join(name for name, outcome in outcomes if outcome == "enforced")
    ignored = ", ".join(name for name, outcome in outcomes if outcome == "ignored")
    refused = [row for row in outcomes if row[1] not in ("enforced", "ignored")]
    rows = "".join(f"| {name} | {reason} |\n" for name, reason in refused)
    return (
        f"Enforced: {enforced}.\n\nWithout effect: {ignored}.\n\n"
        f"| refused | the reason that the error gives |\n|---|---|\n{rows}"
    )


def _outcome(schema: Any, text: str, engine: Engine) -> str:
    try:
        grammar = Grammar(schema, engine)
    except UsageError as error:
        return str(error).removeprefix("the schema is not supported: ").replace("|", "\\|")
    return "ignored" if accepts(grammar, text) else "enforced"


def documented(page: str) -> str:
    """Return the part of docs/serve.md between the markers."""
    return page.partition(BEGIN)[2].partition(END)[0]


def _engines() -> Iterator[Engine]:
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_gguf(Path(folder) / "model.gguf")
        with Engine.open(path, n_ctx=32, threads=1) as engine:
            yield engine


if __name__ == "__main__":
    for _engine in _engines():
        _page = PAGE.read_text(encoding="utf-8")
        _old = BEGIN + documented(_page) + END
        PAGE.write_text(_page.replace(_old, BEGIN + table(_engine) + END), encoding="utf-8")
