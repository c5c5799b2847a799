"""Errors on the way to the hub, each as one sentence that says what to do."""

from dots1_local.errors import CheckpointError

__all__ = ["complaint", "is_passing", "pause_asked_for"]

_PASSING = (408, 429, 500, 502, 503, 504)
_TOKEN = "give a token with `hf auth login` or in HF_TOKEN"
_AGAIN = "run the same command again: what is fetched is kept"


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING
    hopeless = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
    return isinstance(error, httpx.TransportError) and not isinstance(error, hopeless)


def pause_asked_for(error: BaseException) -> float | None:
    """The seconds that the server wants to be left alone, where it says so."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return None
    seconds = error.response.headers.get("Retry-After", "")
    return float(seconds) if seconds.isdecimal() else None


def complaint(
    error: BaseException, name: str, endpoint: str, where: str, what: str
) -> CheckpointError | None:
    """The sentence for an error while `what` of the repository `name` was asked for.

    `where` is what to call the repository. None for an error that has nothing to do with the hub.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return CheckpointError(f"HF_HUB_OFFLINE keeps from fetching {what} of {where}; unset it")
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"{endpoint} has no {what} of {name}")
    if isinstance(error, EntryNotFoundError):
        return CheckpointError(f"{where} has no file {what}")
    if isinstance(error, HfHubHTTPError):
        return CheckpointError(_of_status(error, name, endpoint, where, what))
    if isinstance(error, httpx.HTTPError):
        return CheckpointError(
            f"{endpoint} cannot be reached ({_in_a_line(error)}); see to the network and {_AGAIN}"
        )
    return None


def _of_status(error: Exception, name: str, endpoint: str, where: str, what: str) -> str:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    assert isinstance(error, HfHubHTTPError)
    status = error.response.status_code
    if isinstance(error, GatedRepoError) or status == 403:
        return (
            f"{endpoint} does not let you read {name}: accept its terms at {endpoint}/{name}, "
            f"and {_TOKEN}"
        )
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return f"{endpoint} has no repository {name} that you may read; for a private one, {_TOKEN}"
    if status == 429:
        return (
            f"{endpoint} has had too many requests from here (HTTP 429); wait some minutes and "
            f"{_AGAIN}"
        )
    return f"{endpoint} answers HTTP status {status} for {what} of {where}; wait and {_AGAIN}"


def _in_a_line(error: BaseException) -> str:
    line = " ".join(str(error).split())[:200] or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in line)
