"""An HTTP server that plays back answers of OpenAI-compatible servers, and records requests.

The answers have the shapes that vLLM, SGLang and llama.cpp's server document or send.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Semaphore, Thread
from typing import Any

__all__ = [
    "VLLM_MODELS",
    "Played",
    "Playing",
    "Request",
    "answer",
    "as_json",
    "chunk",
    "playing",
    "refused",
    "sse",
    "usage",
]

_DEADLINE = 30  # seconds; only a failing test waits so long

VLLM_MODELS = {
    "object": "list",
    "data": [
        {
            "id": "dots1",
            "object": "model",
            "created": 1755000000,
            "owned_by": "vllm",
            "root": "rednote-hilab/dots.llm1.inst",
            "parent": None,
            "max_model_len": 2048,
            "permission": [],
        }
    ],
}


@dataclass(frozen=True)
class Played:
    """One answer: its body in `pieces`, with events to wait for; `cut` leaves its end out."""

    pieces: Sequence[bytes | Event] = ()
    status: int = 200
    kind: str = "text/event-stream; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


@dataclass
class Playing:
    """The server: its address, its requests, and whether a client `left` during an answer.

    `posted` is released for every POST request. `stop` ends the server.
    """

    url: str
    asked: list[Request] = field(default_factory=list)
    posted: Semaphore = field(default_factory=lambda: Semaphore(0))
    left: Event = field(default_factory=Event)
    stop: Callable[[], None] = lambda: None

    @property
    def bodies(self) -> list[Any]:
        """The bodies of POST requests."""
        return [request.body for request in self.asked if request.method == "POST"]


def as_json(value: Any, status: int = 200, **headers: str) -> Played:
    return Played([json.dumps(value).encode()], status, "application/json", headers)


def refused(
    message: str,
    status: int = 400,
    *,
    kind: str = "BadRequestError",
    bare: bool = False,
    **more: Any,
) -> Played:
    """An error of vLLM or SGLang: under "error", or `bare` as in their older versions."""
    detail = {"message": message, "type": kind, "param": None, "code": status, **more}
    return as_json({"object": "error", **detail} if bare else {"error": detail}, status)


def chunk(text: str | None = None, finish: str | None = None, **choice: Any) -> dict[str, Any]:
    """A chunk of a streamed chat."""
    delta = {} if text is None else {"content": text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1755000000,
        "model": "dots1",
        "choices": [
            {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, **choice}
        ],
    }


def usage(prompt: int, completion: int, cached: int | None = None, **more: Any) -> dict[str, Any]:
    """The last chunk of a chat with its usage; vLLM may leave `cached` out."""
    details = None if cached is None else {"cached_tokens": cached}
    counts = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": details,
    }
    return {**chunk(), "choices": [], "usage": counts, **more}


def sse(*chunks: Any, done: bool = True) -> bytes:
    """Chunks as events, and the [DONE] that ends them."""
    lines = [f"data: {json.dumps(each, ensure_ascii=False)}\n\n" for each in chunks]
    return "".join([*lines, *["data: [DONE]\n\n"] * done]).encode()


def answer(
    *texts: str, finish: str = "stop", prompt: int = 20, cached: int | None = None
) -> Played:
    """A whole streamed chat, as vLLM sends one."""
    counts = usage(prompt, len(texts), cached)
    return Played([sse(chunk(""), *map(chunk, texts), chunk(finish=finish), counts)])


@contextmanager
def playing(
    *answers: Played,
    models: Played | None = None,
    base: str = "/v1",
    elsewhere: Played | None = None,
) -> Iterator[Playing]:
    """Serve `answers` in turn to POST requests, and `models` under `base`.

    Other paths get `elsewhere`, or else a 404.
    """
    found = Playing("")
    left = iter(answers)
    listed = models or as_json(VLLM_MODELS)
    others = elsewhere or refused("Not Found", 404, kind="NotFound")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._play(listed if self.path == f"{base}/models" else others, None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.posted.release()
            self._play(next(left), body)

        def _play(self, played: Played, body: Any) -> None:
            found.asked.append(Request(self.command, self.path, dict(self.headers), body))
            self.send_response(played.status)
            self.send_header("Content-Type", played.kind)
            self.send_header("Transfer-Encoding", "chunked")
            for name, value in played.headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            try:
                self._write(played.pieces)
                if not played.cut:
                    self.wfile.write(b"0\r\n\r\n")
            except OSError:
                found.left.set()
            self.close_connection = True

        def _write(self, pieces: Iterable[bytes | Event]) -> None:
            for piece in pieces:
                if isinstance(piece, Event):
                    piece.wait(_DEADLINE)
                elif piece:
                    self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}{base}"
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def stop() -> None:
            server.shutdown()
            server.server_close()

        found.stop = stop
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()
