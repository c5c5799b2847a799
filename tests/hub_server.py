"""A server on this machine that speaks the part of the Hugging Face hub's API that is used.

It redirects large files to another host name, as the hub does. It can cut connections, send other
bytes than it lists, refuse requests, and move its branch; and it remembers the requests.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Self
from urllib.parse import unquote, urlsplit

__all__ = ["FORMER_NAME", "HEADER", "NAME", "HubServer", "Request", "is_shard"]

NAME = "someone/dots1-tiny"
FORMER_NAME = "before/dots1-tiny"  # answers as a renamed repository does
HEADER = 1 << 17  # bytes of a request for a shard's header; faults do not affect these
_CHUNK = 1 << 14
_HUGE = 1 << 30  # bytes


@dataclass
class Request:
    """A request for bytes of a file from `start`, and how many bytes were sent."""

    file: str
    start: int
    count: int = 0


class HubServer:
    """Serves the files of folders as commits of one repository; `main` is the last commit."""

    def __init__(self, folder: Path) -> None:
        self.commits: dict[str, Path] = {}
        self.main = self.commit(folder)
        self.requests: list[Request] = []
        self.cuts: dict[str, list[int]] = defaultdict(list)  # bytes after which a request ends
        self.damaged: dict[str, int] = {}  # how often a file is sent with wrong bytes
        self.statuses: dict[str, list[int]] = defaultdict(list)  # by file, or "api"
        self.starts: dict[str, bytes] = {}  # sent instead of a shard's first bytes, for its header
        self.page: bytes | None = None  # the API's answer, if not None
        self.gated = False  # refuses as the hub does before its terms are accepted
        self.etags = ""  # before the hash
        self.ignores_ranges = False
        self.tokens: set[tuple[str, str]] = set()  # host names, and what they were shown
        self.watch: Callable[[], object] = lambda: None  # called at every request and chunk
        self._lock = Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, folder: Path) -> str:
        """Make this the newest commit."""
        digest = hashlib.sha1(f"{len(self.commits)}{folder}".encode()).hexdigest()
        self.commits[digest] = folder
        self.main = digest
        return digest

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that takes this server for the hub."""
        here = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": "", "NO_PROXY": "*"}
        return {**os.environ, **here}

    def find(self, revision: str) -> str | None:
        """Return the commit that a revision names."""
        revision = self.main if revision == "main" else revision
        return revision if revision in self.commits else None

    def began(self, file: str, start: int) -> Request:
        request = Request(file, start)
        with self._lock:
            self.requests.append(request)
        return request

    def take(self, faults: dict[str, list[int]], key: str) -> int | None:
        with self._lock:
            return faults[key].pop(0) if faults[key] else None

    def spoils(self, file: str) -> bool:
        """Whether this answer has to be damaged."""
        with self._lock:
            left = self.damaged.get(file, 0)
            self.damaged[file] = max(left - 1, 0)
        return left > 0

    def shard_requests(self) -> list[Request]:
        """Requests for more of a shard than its header."""
        with self._lock:
            return [r for r in self.requests if is_shard(r.file) and (r.start or r.count > HEADER)]

    def shard_bytes(self) -> dict[str, int]:
        """Bytes sent of each shard, without requests for headers."""
        total: dict[str, int] = defaultdict(int)
        for request in self.shard_requests():
            total[request.file] += request.count
        return dict(total)


def is_shard(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf"))


def is_large(name: str) -> bool:
    return is_shard(name) or name == "tokenizer.json"


def listed(path: Path, folder: Path | None = None) -> dict[str, Any]:
    """A file as the API lists it."""
    name = path.relative_to(folder or path.parent).as_posix()
    return {"rfilename": name} | _listed(path, path.stat().st_mtime_ns, is_large(path.name))


@cache
def _listed(path: Path, time: int, in_lfs: bool) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _HUGE:  # sparse files, of which nobody reads all
        sha1 = sha256 = "0" * 64
    else:
        content = path.read_bytes()
        sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        sha256 = hashlib.sha256(content).hexdigest()
    entry: dict[str, Any] = {"size": size, "blobId": sha1[:40]}
    if in_lfs:
        entry["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
    return entry


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that were killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.hub.watch()
        shown = (self.headers["Host"].partition(":")[0], self.headers.get("Authorization", ""))
        self.server.hub.tokens.add(shown)
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        try:
            if f"/{FORMER_NAME}" in self.path:
                moved = self.path.replace(FORMER_NAME, NAME)
                self._answer(307, {"Location": moved, "Content-Length": "0"})
            elif parts[:2] == ["api", "models"]:
                self._api("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
            elif parts[0] == "cdn":
                self._content(self.server.hub.commits[parts[1]] / "/".join(parts[2:]))
            elif parts[2:3] == ["resolve"]:
                self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self._refuse(404, "")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _api(self, name: str, revision: str) -> None:
        commit = self.server.hub.find(revision)
        if status := self.server.hub.take(self.server.hub.statuses, "api"):
            self._refuse(status, "GatedRepo" if self.server.hub.gated else "")
        elif (page := self.server.hub.page) is not None:
            self._answer(200, {"Content-Length": str(len(page))}, page)
        elif name != NAME:
            self._refuse(404, "RepoNotFound")
        elif commit is None:
            self._refuse(404, "RevisionNotFound")
        else:
            folder = self.server.hub.commits[commit]
            siblings = [
                listed(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()
            ]
            body = json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
            self._answer(200, {"Content-Length": str(len(body))}, body)

    def _resolve(self, name: str, revision: str, file: str) -> None:
        commit = self.server.hub.find(revision)
        if name != NAME or commit is None:
            self._refuse(404, "RevisionNotFound")
            return
        path = self.server.hub.commits[commit] / file
        if status := self.server.hub.take(self.server.hub.statuses, file):
            self._refuse(status, "EntryNotFound" if status == 404 else "")
        elif not path.is_file():
            self._refuse(404, "EntryNotFound")
        elif is_large(file):
            entry = listed(path)["lfs"] if self.command == "HEAD" else {}
            elsewhere = (
                {"X-Linked-Etag": f'"{self.server.hub.etags}{entry["sha256"]}"'} if entry else {}
            )
            self._answer(302, {
                "Location": f"http://localhost:{self.server.hub.port}/cdn/{commit}/{file}",
                "X-Repo-Commit": commit,
                "X-Linked-Size": str(path.stat().st_size),
                "Content-Length": "0",
                **elsewhere,
            })  # fmt: skip
        else:
            etag = f'"{listed(path)["blobId"]}"'
            self._content(path, {"X-Repo-Commit": commit, "ETag": etag})

    def _content(self, path: Path, headers: dict[str, str] | None = None) -> None:
        size = path.stat().st_size
        start, stop = 0, size
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if wanted and not self.server.hub.ignores_ranges:
            first, last = wanted.split("-")
            start, stop = int(first), min(int(last) + 1 if last else stop, stop)
        if start >= size:
            self._answer(416, {"Content-Length": "0"})
            return
        partial = {}
        if wanted and not self.server.hub.ignores_ranges:
            partial = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        status = 206 if partial else 200
        length = {"Content-Length": str(stop - start)}
        self._answer(status, {**length, **partial, **(headers or {})})
        if self.command == "HEAD":
            return
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        if stop - start <= HEADER and path.name in self.server.hub.starts:
            begin = self.server.hub.starts[path.name]
            content = begin + content[len(begin) :]
        if stop - start > HEADER and self.server.hub.spoils(path.name):
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._send(path.name, content, start, stop)

    def _send(self, name: str, content: bytes, start: int, stop: int) -> None:
        cut = self.server.hub.take(self.server.hub.cuts, name) if stop - start > HEADER else None
        end = stop if cut is None else min(start + cut, stop)
        request = self.server.hub.began(name, start)
        for at in range(0, end - start, _CHUNK):
            piece = content[at : min(at + _CHUNK, end - start)]
            self.wfile.write(piece)
            request.count += len(piece)
            self.server.hub.watch()
        if end < stop:
            self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
        body = json.dumps({"error": "no"}).encode()
        headers = {"X-Error-Code": code} if code else {}
        self._answer(status, {"Content-Length": str(len(body)), **headers}, body)

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
