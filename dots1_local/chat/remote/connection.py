"""Why a connection failed, as one sentence that says what to do."""

import socket
import ssl
from http.client import HTTPException, IncompleteRead
from urllib.error import URLError

from dots1_local.errors import Dots1Error

__all__ = ["CONNECT_SECONDS", "connection_failure", "readable"]

CONNECT_SECONDS = 10

_LONGEST = 300  # characters that a sentence of ours quotes


def connection_failure(error: Exception, url: str) -> Dots1Error:
    """The error to raise where a request to `url` or its answer failed."""
    while isinstance(error, URLError) and isinstance(error.reason, OSError):
        error = error.reason
    return Dots1Error(_reason(error, url))


def _reason(error: Exception, url: str) -> str:
    match error:
        case socket.gaierror():
            return f"the host of {url} is not known; check --url and the network"
        case ConnectionRefusedError():
            return f"nobody listens at {url}; start the server, or check --url"
        case TimeoutError():
            return f"{url} cannot be reached within {CONNECT_SECONDS} seconds"
        case ssl.SSLCertVerificationError():
            return (
                f"the certificate of {url} is not trusted: {readable(error.verify_message)}; "
                "SSL_CERT_FILE can name a file of authorities that vouch for it"
            )
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER" | "RECORD_LAYER_FAILURE"):
            return f"no TLS is spoken at {url}; try http:// in place of https://"
        case IncompleteRead() | ConnectionError():
            return f"the connection to {url} was cut"
        case HTTPException():
            return f"what answers at {url} speaks no HTTP"
        case URLError():
            return f"cannot reach {url}: {readable(str(error.reason))}"
        case OSError():
            return f"cannot reach {url}: {readable(error.strerror or str(error))}"
    return f"cannot understand {url}: {readable(str(error))}"


def readable(text: str) -> str:
    """Words from elsewhere, cut to one short line without terminal control characters."""
    harmless = "".join(each if each.isprintable() else " " for each in text[: 4 * _LONGEST])
    line = " ".join(harmless.split()).rstrip(".")
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
