"""JSON from people and strangers: parsed strictly, and converted to typed objects by msgspec.

Python's parser accepts what is not JSON or is ambiguous: NaN, a repeated key, half a surrogate
pair. `parse_json` refuses all three. `convert_json` makes a dataclass or a `msgspec.Struct` of the
result; its errors give the path of the wrong field, such as "devices[0].memory".
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec

from dots1_local.errors import UsageError

__all__ = ["JsonError", "brief", "convert_json", "parse_json", "read_json"]

_LARGEST = 1 << 26  # bytes
_MAY_OVERFLOW = re.compile(rb"\d{308}|[eE]\+?\d{3}")
_Converted = TypeVar("_Converted")


class JsonError(ValueError):
    """JSON that is malformed or does not match its type.

    `path` names the field, such as "messages[0].role"; it is "" for the whole document. `reason` is
    a clause such as "expected int, got str".
    """

    def __init__(self, reason: str, path: str = "") -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}" if path else reason)


def parse_json(data: bytes) -> Any:
    """Parse one JSON value in UTF-8, with or without a byte order mark.

    Raises:
        JsonError: the text is not JSON, an object repeats a key, or a text holds half a surrogate
            pair, which no UTF-8 can carry.
    """
    try:
        value = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_unrepeated,
            parse_constant=_refuse_constant,
            parse_float=_finite if _MAY_OVERFLOW.search(data) else None,  # the hook is slow
        )
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise JsonError("a text holds half a surrogate pair") from None
    except UnicodeDecodeError:
        raise JsonError("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"it is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise JsonError("it is nested too deeply") from None
    except ValueError as error:
        raise JsonError(str(error)) from None
    return value


def convert_json(value: Any, kind: type[_Converted]) -> _Converted:
    """Convert a parsed JSON value to `kind`, a dataclass, a Struct or any type msgspec knows.

    Nothing is coerced: "1" is not 1, and true is not 1. Use Structs with `forbid_unknown_fields`
    where a misspelt key must not pass.

    Raises:
        JsonError: the value does not match; `path` names the field.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:  # such as "Expected `int`, got `str` - at `$.a[0]`"
        reason, _, place = str(error).partition(" - at ")
        path = re.sub(r"\$\.?|`", "", place)
        found = re.fullmatch(r"Invalid (?:enum )?value (.*)", reason)
        if found and (choices := _choices(kind, path)):
            reason = f"Expected one of {', '.join(map(str, choices))}, got {found[1]:.60}"
        reason = re.sub(r"`(.+?)`", r"\1", reason[:1].lower() + reason[1:])
        raise JsonError(reason, path) from None


def _choices(kind: Any, path: str) -> list[Any]:
    """Return the values that the field of `kind` at `path` may have, if its type lists them."""
    schema = msgspec.json.schema(kind)

    def alternatives(node: Any) -> list[Any]:
        if "$ref" in node:
            return alternatives(schema["$defs"][node["$ref"].rpartition("/")[2]])
        if "anyOf" in node:
            return [each for part in node["anyOf"] for each in alternatives(part)]
        return [node]

    nodes = alternatives(schema)
    for part in re.findall(r"\[\.\.\.\]|[^.\[\]]+", path):
        rest = "additionalProperties" if part == "[...]" else "items"
        below = (node.get("properties", {}).get(part, node.get(rest)) for node in nodes)
        nodes = [each for child in below if child for each in alternatives(child)]
    return [value for node in nodes for value in node.get("enum", ()) if value is not None]


def read_json(path: str | Path, name: str) -> Any:
    """Parse the JSON file at `path`; `name` says what kind of file it should be.

    Raises:
        UsageError: the file is missing, unreadable, too large, or not strict JSON.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
            raise UsageError(f"{path} is not a file")
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise UsageError(f"{path} is too large for a {name}")
        return parse_json(data)
    except JsonError as error:
        raise UsageError(f"{path} is not a {name}: {error}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read {path}: {reason}") from None


def _unrepeated(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {name!r} twice")
    return found


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{digits:.20} is larger than any float")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def brief(value: Any) -> str:
    """A value, shortened so that an error can quote it."""
    return f"{value!r:.40}"
