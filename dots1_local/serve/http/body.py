"""A request's body: bounded in size and time, and strict JSON.

The fields of a request, read with checks of their type and range.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from starlette.requests import Request

from dots1_local.files.json_file import brief, unrepeated
from dots1_local.serve.http.errors import ApiError, invalid

__all__ = [
    "Fields",
    "parse",
    "read",
]


_LARGEST = 8 << 20  # bytes: 30 times what a context of 32k tokens takes
_SECONDS = 30.0  # for all of a body to come


async def read(request: Request) -> bytes:
    """The bytes of a JSON body.

    Raises:
        ApiError: another kind of content, too large, or too slow in coming.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        # Browsers let any web page post other types; for this one they ask first (CORS).
        raise ApiError(415, "the body must be JSON; send Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > _LARGEST:
                    raise ApiError(413, f"the body is larger than {_LARGEST >> 20} MiB")
    except TimeoutError:
        message = f"the body did not come within {_SECONDS:.0f} seconds"
        raise ApiError(408, message, headers={"Connection": "close"}) from None
    return bytes(body)


def parse(body: bytes) -> Any:
    """The JSON value in a body.

    Raises:
        ApiError: it is malformed or nested too deeply, or has NaN, a key twice, or half a
            surrogate pair.
    """
    try:
        value = json.loads(
            body.decode(), object_pairs_hook=unrepeated, parse_constant=_not_a_number
        )
        if b"\\ud" in body.lower():  # an escape that may be half a character
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise invalid(f"the body is no UTF-8 text (at byte {error.start:,})") from None
    except UnicodeEncodeError:
        raise invalid("the body has half a character: a surrogate without its other") from None
    except RecursionError:
        raise invalid("the body is nested too deeply") from None
    except ValueError as error:
        raise invalid(f"the body is no JSON: {error}") from None
    return value


def _not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


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
