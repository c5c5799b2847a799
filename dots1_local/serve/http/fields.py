"""The fields of a request, read with checks of their type and range."""

from collections.abc import Mapping, Sequence
from typing import Any

from dots1_local.documents import brief
from dots1_local.serve.http.errors import ApiError, invalid

__all__ = ["Fields"]


class Fields:
    """A JSON object in a request; a field that is null or missing reads as None.

    `where` comes before field names in errors, such as "messages[0].".
    """

    def __init__(self, raw: Any, where: str = "") -> None:
        self._where = where
        if not isinstance(raw, dict):
            name = where.removesuffix(".")
            raise invalid(f"{name or 'the body'} is {brief(raw)}, not an object", name or None)
        self._raw: Mapping[str, Any] = raw

    def name(self, key: str) -> str:
        """What the field is called in errors."""
        return self._where + key

    def value(self, key: str) -> Any:
        """The field's value, unchecked."""
        return self._raw.get(key)

    def text(self, key: str) -> str | None:
        value = self._raw.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def boolean(self, key: str) -> bool:
        """False where it is not given."""
        value = self._raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return bool(value)

    def integer(self, key: str, least: int, most: int) -> int | None:
        value = self._raw.get(key)
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise self.wrong(key, f"an integer from {least} to {most}")
        return value

    def number(self, key: str, least: float, most: float) -> float | None:
        value = self._raw.get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not least <= value <= most:  # NaN is neither
            raise self.wrong(key, f"a number from {least:g} to {most:g}")
        return float(value)

    def choice(self, key: str, choices: Sequence[str]) -> str | None:
        value = self._raw.get(key)
        if value is not None and value not in choices:
            raise self.wrong(key, f"one of {', '.join(choices)}")
        return value

    def items(self, key: str, most: int) -> list[Any] | None:
        value = self._raw.get(key)
        if value is not None and (not isinstance(value, list) or len(value) > most):
            raise self.wrong(key, f"a list of at most {most}")
        return value

    def group(self, key: str) -> "Fields | None":
        """The object under `key`."""
        value = self._raw.get(key)
        return None if value is None else Fields(value, f"{self.name(key)}.")

    def required(self, key: str, what: str) -> ApiError:
        """The error for a field that is missing."""
        return invalid(f"{self.name(key)} is missing; give {what}", self.name(key))

    def wrong(self, key: str, wanted: str) -> ApiError:
        name = self.name(key)
        return invalid(f"{name} is {brief(self._raw.get(key))}, not {wanted}", name)
