"""GET /: the chat page, whose files come with this package.

All of its addresses are relative, so that it works behind a path prefix. The files need no key,
because they hold no secrets; the page asks for the key. The policy lets the page load and call
nothing but this server, and run no code but its files.
"""

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["CONTENT_SECURITY_POLICY", "page_routes"]

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
_FOLDER = Path(__file__).parents[1] / "page"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # browsers ask whether their copy is still the newest
    "Vary": "Accept-Encoding",
}


@dataclass(frozen=True)
class _File:
    """A file of the page, compressed and not."""

    media_type: str
    plain: bytes
    compressed: bytes
    etag: str

    async def respond(self, request: Request) -> Response:
        headers = {**_HEADERS, "ETag": self.etag}
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=304, headers=headers)
        body = self.plain
        if "gzip" in request.headers.get("accept-encoding", ""):
            body, headers["Content-Encoding"] = self.compressed, "gzip"
        return Response(body, headers=headers, media_type=self.media_type)


def page_routes() -> list[Route]:
    """Return a route for each file of the page; no other file can be reached."""
    return [Route(path, file.respond) for path, file in _files().items()]


@cache
def _files() -> Mapping[str, _File]:
    """Return the files of the page by their paths."""
    found = {}
    for path in sorted(_FOLDER.rglob("*")):
        if media_type := _TYPES.get(path.suffix):
            name = path.relative_to(_FOLDER).as_posix()
            found["/" if name == "index.html" else f"/page/{name}"] = _read(path, media_type)
    return found


def _read(path: Path, media_type: str) -> _File:
    plain = path.read_bytes()
    etag = f'"{hashlib.sha256(plain).hexdigest()[:32]}"'
    return _File(media_type, plain, gzip.compress(plain, mtime=0), etag)
