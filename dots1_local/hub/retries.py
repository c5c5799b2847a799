"""Requests to the hub: repeated where that may help, and their errors as sentences."""

import time
from collections.abc import Callable
from typing import TypeVar

from dots1_local.errors import CheckpointError, readable

__all__ = ["Unreachable", "ask", "hub_error", "is_transient"]

_PAUSES = (1.0, 2.0, 4.0)  # seconds before further tries
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_TOKEN = "give a token with `hf auth login` or in HF_TOKEN"
_AGAIN = "run the same command again: fetched files are kept"
_Result = TypeVar("_Result")


class Unreachable(CheckpointError):
    """There is no connection to the hub."""


def ask(request: Callable[[], _Result], endpoint: str, name: str, what: str) -> _Result:
    """Call `request`, and again if the server or the network fails for a moment.

    Raises:
        CheckpointError: `what`, such as "file config.json" of repository `name`, is refused.
    """
    import httpx2

    pauses = iter(_PAUSES)
    while True:
        try:
            return request()
        except Exception as error:
            # huggingface_hub wraps the cause if a file is neither on the hub nor in the cache.
            wraps = isinstance(error, (FileNotFoundError, ValueError))
            cause = (error.__cause__ if wraps else None) or error
            pause = next(pauses, None) if is_transient(cause) else None
            if pause is None:
                if sentence := hub_error(cause, endpoint, name, what):
                    lost = isinstance(cause, httpx2.TransportError)
                    raise (Unreachable if lost else CheckpointError)(sentence) from error
                raise
        time.sleep(pause)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    import httpx2

    if (response := getattr(error, "response", None)) is not None:
        return response.status_code in _TRANSIENT
    broken = (httpx2.TimeoutException, httpx2.ReadError, httpx2.RemoteProtocolError)
    return isinstance(error, broken)


def hub_error(error: BaseException, endpoint: str, name: str, what: str) -> str | None:
    """Say in one sentence what is wrong and what to do; None if it is not an error of the hub."""
    import httpx2
    from huggingface_hub import errors

    if isinstance(error, (errors.RevisionNotFoundError, errors.EntryNotFoundError)):
        return f"{endpoint}/{name} has no {what}"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 403 or isinstance(error, errors.GatedRepoError):
            return f"accept the terms of {name} at {endpoint}/{name} to read it, and {_TOKEN}"
        if status in (401, 404):
            return f"{endpoint} has no repository {name} that you may read; if private, {_TOKEN}"
        return f"{endpoint} answers HTTP status {status} for {what} of {name}; wait, and {_AGAIN}"
    if isinstance(error, httpx2.HTTPError):
        reason = readable(str(error)) or type(error).__name__
        return f"{endpoint} cannot be reached ({reason}); check the network and {_AGAIN}"
    return None
