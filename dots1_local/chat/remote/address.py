"""A server's address and API key as the user gives them, checked before anything is sent."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import quote, urlsplit

from dots1_local.errors import UsageError

__all__ = ["KEY_VARIABLES", "Address", "Key", "key_from"]

KEY_VARIABLES = ("DOTS1_API_KEY", "OPENAI_API_KEY")

_LOCAL_ENDINGS = (".localhost", ".local", ".lan", ".internal", ".home.arpa")


@dataclass(frozen=True)
class Address:
    """The base of a server's API, such as http://127.0.0.1:8000/v1."""

    url: str

    @classmethod
    def parse(cls, text: str) -> "Address":
        """The address in a text, without slashes at its end.

        Raises:
            UsageError: it is no http or https URL, or has a password, query or fragment. The
                sentence does not repeat a password.
        """
        example = "give it as http://HOST:8000/v1"
        if not text.isprintable() or " " in text:
            raise UsageError(f"--url has blanks or control characters in it; {example}")
        if "@" in text.partition("://")[2].partition("/")[0]:
            raise UsageError(f"--url has a password in it; put the key into {KEY_VARIABLES[0]}")
        try:
            parts = urlsplit(text)
            port, host = parts.port, (parts.hostname or "").encode("idna").decode()
        except ValueError:  # a UnicodeError is one
            raise UsageError(f"--url is {text!r}, which is no address; {example}") from None
        if parts.scheme not in ("http", "https") or not host:
            raise UsageError(f"--url is {text!r}, which is no http or https address; {example}")
        if parts.query or parts.fragment:
            raise UsageError(f"--url has more than a path in it; {example}")
        place = f"[{host}]" if ":" in host else host
        if port is not None:
            place += f":{port}"
        return cls(f"{parts.scheme}://{place}{quote(parts.path, safe='/%').rstrip('/')}")

    @property
    def versioned(self) -> "Address":
        """The same address, ending in /v1."""
        return self if self.url.endswith("/v1") else Address(f"{self.url}/v1")

    @property
    def host(self) -> str:
        """The host's name or IP address."""
        return urlsplit(self.url).hostname or ""

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine itself."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def exposed(self) -> bool:
        """Whether others on the way there can read what is sent, such as a key."""
        if self.url.startswith("https:"):
            return False
        try:
            return ip_address(self.host).is_global
        except ValueError:
            near = "." not in self.host or self.host.endswith(_LOCAL_ENDINGS)
            return not near


@dataclass(frozen=True, repr=False)
class Key:
    """An API key and the `variable` it was found in; its repr does not show it."""

    text: str
    variable: str

    def hidden_in(self, text: str) -> str:
        """`text` with the key blotted out."""
        return text.replace(self.text, "(the key)")


def key_from(environment: Mapping[str, str] = os.environ) -> Key | None:
    """The API key in the environment, if there is one.

    Raises:
        UsageError: it has characters that no header can have.
    """
    for variable in KEY_VARIABLES:
        if text := environment.get(variable, "").strip():
            if not text.isascii() or not text.isprintable():
                raise UsageError(f"{variable} has characters in it that no key has")
            return Key(text, variable)
    return None
