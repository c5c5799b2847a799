"""A request's body: bounded in size and time, and strict JSON."""

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from dots1_local.documents import unrepeated
from dots1_local.serve.http.errors import ApiError, invalid

__all__ = ["parse", "read"]

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
