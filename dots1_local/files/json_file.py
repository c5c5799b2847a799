"""JSON from people and strangers: parsed strictly, and converted to typed objects by msgspec.

Python's parser takes what is not JSON or not one value: NaN, a key given twice, half a surrogate
pair. `parse_json` refuses all three. `convert_json` turns the result into a dataclass or a
`msgspec.Struct` and names the field that is wrong by its path, such as "devices[0].memory".
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec

from dots1_local.errors import UsageError

__all__ = [
    "Fields",
    "JsonError",
    "brief",
    "convert_json",
    "parse_json",
    "read_document",
    "read_json",
    "read_object",
    "unrepeated",
]

_LARGEST = 1 << 26  # bytes
_LONGEST = 1 << 12  # characters of a text
_LARGEST_NUMBER = 1e300  # no more than a float holds, and no NaN
_T = TypeVar("_T", bound=str)
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
            object_pairs_hook=unrepeated,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise JsonError("a text holds half a surrogate pair") from None
    except UnicodeDecodeError:
        raise JsonError("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"it is not JSON: {error.msg} at byte {error.pos}") from None
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
    except msgspec.ValidationError as error:
        raise _validation_error(str(error)) from None


def read_json(path: str | Path, name: str) -> Any:
    """Parse the JSON file at `path`; `name` says what kind of file it should be.

    Raises:
        UsageError: the file is missing, unreadable, too large, or not strict JSON.
    """
    try:
        return parse_json(_read_bytes(Path(path), name))
    except JsonError as error:
        raise UsageError(f"{path} is not a {name}: {error}") from None


def _validation_error(message: str) -> JsonError:
    """Rewrite msgspec's "Expected `int`, got `str` - at `$.a[0]`"."""
    reason, _, path = message.partition(" - at ")
    reason = re.sub(r"`(.+?)`", r"\1", reason[:1].lower() + reason[1:])
    return JsonError(reason, path.strip("`").removeprefix("$").removeprefix("."))


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{digits:.20} is larger than any float")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class Fields:
    """One JSON object; each key is taken once, with the kind of value it must have.

    `what` begins the sentence that is raised: "machine.json: the CPU".
    """

    def __init__(self, raw: Any, what: str) -> None:
        if not isinstance(raw, dict):
            raise UsageError(f"{what} is {brief(raw)}, not a JSON object")
        self._raw, self._what = dict(raw), what

    def given(self, key: str) -> bool:
        """Whether there is a value under `key`; null is none, and taken with that."""
        if self._raw.get(key) is None:
            self._raw.pop(key, None)
            return False
        return True

    def take(self, key: str) -> Any:
        """Whatever is under `key`."""
        if key not in self._raw:
            raise UsageError(f"{self._what} has no {key!r}")
        return self._raw.pop(key)

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str) or not value.isprintable() or len(value) > _LONGEST:
            raise self._wrong(key, value, "a line of text")
        return value

    def integer(self, key: str, least: int = 0, most: int = 1 << 53) -> int:
        value = self.take(key)
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(key, value, f"an integer from {least} to {most}")
        return value

    def number(self, key: str, *, zero: bool = False) -> float:
        """A finite float above 0, or 0 where `zero` allows it."""
        value = self.take(key)
        plain = type(value) in (int, float) and abs(value) <= _LARGEST_NUMBER
        if not plain or value < 0 or (value == 0 and not zero):
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.take(key)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def choice(self, key: str, choices: Sequence[_T]) -> _T:
        value = self.take(key)
        for choice in choices:
            if value == choice:
                return choice
        raise self._wrong(key, value, f"one of {', '.join(choices)}")

    def items(self, key: str, most: int = 1 << 16) -> list[Any]:
        value = self.take(key)
        if not isinstance(value, list) or len(value) > most:
            raise self._wrong(key, value, "a list")
        return value

    def group(self, key: str) -> "Fields":
        """The object under `key`."""
        return Fields(self.take(key), f"{self._what}, {key!r},")

    def ignore(self, key: str) -> None:
        """Take a key that means nothing here."""
        self._raw.pop(key, None)

    def rest(self) -> list[str]:
        """What has not been taken yet."""
        return list(self._raw)

    def end(self) -> None:
        """Refuse what nobody took: a misspelt key would be silently without effect."""
        if self._raw:
            raise UsageError(f"{self._what} has an unknown key {next(iter(self._raw))!r}")

    def _wrong(self, key: str, value: Any, wanted: str) -> UsageError:
        return UsageError(f"{self._what} has {brief(value)} as {key!r}, not {wanted}")


def read_document(path: str | Path, kind: str, name: str, version: int = 1) -> Fields:
    """The object in a file whose "format" is `kind`; `name` says what such a file is.

    Raises:
        UsageError: missing, too large, no JSON, another format or a newer version.
    """
    raw = read_object(path, name)
    if raw.pop("format", None) != kind:
        raise UsageError(f"{path} is no {name}")
    if raw.pop("version", None) != version:
        raise UsageError(f"{path} is a {name} of another version of dots1-local")
    return Fields(raw, str(path))


def read_object(path: str | Path, name: str) -> dict[str, Any]:
    """The JSON object in a file; `name` says what such a file is.

    Raises:
        UsageError: missing, too large, or no JSON object.
    """
    path = Path(path)
    return _parse(path, _read_bytes(path, name), name)


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise UsageError(f"{path} is not a file")
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read {path}: {reason}") from None
    if len(data) > _LARGEST:
        raise UsageError(f"{path} is too large for a {name}")
    return data


def _parse(path: Path, data: bytes, name: str) -> dict[str, Any]:
    try:
        raw = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unrepeated)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raw = None
    except ValueError as error:
        raise UsageError(f"{path} is no {name}: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path} is no {name}")
    return raw


def unrepeated(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A hook for `json.loads` that raises ValueError where an object has a key twice."""
    [(name, count)] = Counter(name for name, _ in pairs).most_common(1) or [("", 1)]
    if count > 1:
        raise ValueError(f"it has {name!r} twice")
    return dict(pairs)


def brief(value: Any) -> str:
    """A value as an error can quote it."""
    return f"{value!r:.40}"
