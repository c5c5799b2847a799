"""One path for each endpoint, however a client's base URL is written.

Clients append to their base URL what they think it lacks. So slashes may be doubled or left at the
end, /v1 may be missing, be there twice, or precede an endpoint that has none, and a client that
takes the server for a proxy sends the whole URL.
"""

import re
from collections.abc import Iterable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["CanonicalPath"]

_ORIGIN = re.compile(r"https?://[^/]*", re.IGNORECASE)
_VERSION = "v1"


class CanonicalPath:
    """Gives each request the path that the routes have; other paths lose superfluous slashes.

    `paths` are those of the endpoints.
    """

    def __init__(self, app: ASGIApp, paths: Iterable[str]) -> None:
        self._app, self._starts = app, dict(map(_start, paths))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":  # changed in place, so that errors have the path's shape too
            scope["path"] = _canonical(scope["path"], self._starts)
        await self._app(scope, receive, send)


def _start(path: str) -> tuple[str, list[str]]:
    """Return an endpoint's first name, and what precedes it."""
    segments = _segments(path)
    before = segments[:1] if segments[0] == _VERSION else []
    return segments[len(before)], before


def _canonical(path: str, starts: Mapping[str, list[str]]) -> str:
    segments = _segments(_ORIGIN.sub("", path, count=1) if _ORIGIN.match(path) else path)
    names = segments[:]
    while names and names[0] == _VERSION:
        del names[0]
    if names and names[0] in starts:
        segments = [*starts[names[0]], *names]
    return "/" + "/".join(segments)


def _segments(path: str) -> list[str]:
    return [segment for segment in path.split("/") if segment]
