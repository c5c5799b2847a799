"""A server's address and API key as the user gives them, checked before anything is sent."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address

import httpx2

from dots1_local.errors import UsageError

__all__ = ["KEY_VARIABLES", "Key", "is_exposed", "is_loopback", "key_from", "parse_address"]

KEY_VARIABLES = ("DOTS1_API_KEY", "OPENAI_API_KEY")

_LOCAL_ENDINGS = (".localhost", ".local", ".lan", ".internal", ".home.arpa")


def parse_address(text: str) -> httpx2.URL:
    """Parse the base of a server's API, such as http://127.0.0.1:8000/v1, without a final slash.

    Raises:
        UsageError: it is not an http or https URL, or contains a password, query or fragment. The
            sentence does not repeat a password.
    """
    example = "give it as http://HOST:8000/v1"
    if not text.isprintable() or " " in text:
        raise UsageError(f"--url contains blanks or control characters; {example}")
    if "@" in text.partition("://")[2].partition("/")[0]:
        raise UsageError(f"--url contains a password; put the key into {KEY_VARIABLES[0]} instead")
    try:
        url = httpx2.URL(text)
        url.raw_host.decode().encode("idna")  # fails if a part is too long
    except (httpx2.InvalidURL, UnicodeError):
        raise UsageError(f"--url is {text!r}, which is not a valid address; {example}") from None
    if url.scheme not in ("http", "https") or not url.host or (url.port or 0) > 65535:
        raise UsageError(f"--url is {text!r}, which is not an http or https address; {example}")
    if url.query or url.fragment:
        raise UsageError(f"--url contains more than a path; {example}")
    return url.copy_with(raw_path=url.raw_path.rstrip(b"/?"), fragment=None)


def is_loopback(url: httpx2.URL) -> bool:
    """Whether the server is this machine itself."""
    try:
        return url.host == "localhost" or ip_address(url.host).is_loopback
    except ValueError:
        return False


def is_exposed(url: httpx2.URL) -> bool:
    """Whether strangers on the network can read what is sent, such as a key."""
    if url.scheme == "https":
        return False
    try:
        return ip_address(url.host).is_global
    except ValueError:
        return "." in url.host and not url.host.endswith(_LOCAL_ENDINGS)


@dataclass(frozen=True, repr=False)
class Key:
    """An API key and the `variable` that holds it; its repr does not show it."""

    text: str
    variable: str

    def hidden_in(self, text: str) -> str:
        """Return `text` without the key."""
        return text.replace(self.text, "(the key)")


def key_from(environment: Mapping[str, str] = os.environ) -> Key | None:
    """Return the API key in the environment, if there is one.

    Raises:
        UsageError: it contains characters that an HTTP header cannot hold.
    """
    for variable in KEY_VARIABLES:
        if text := environment.get(variable, "").strip():
            if not text.isascii() or not text.isprintable():
                raise UsageError(f"{variable} contains characters that no key has")
            return Key(text, variable)
    return None
