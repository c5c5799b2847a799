"""A `dots1 serve` that the HTTP trials share, and what must hold of it after each of them."""

import atexit
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from benchmarks.campaign.trial import Broken

__all__ = ["LENGTH", "PATHS", "Server", "check_error", "server", "text_of"]

LENGTH = 12  # tokens of an answer
PATHS = {
    "chat": "/v1/chat/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
    "completions": "/v1/completions",
}
_PROMPTS = 24
_DECISIVE = 0.5  # natural logarithm: rounding, which differs with the batch, changes no such choice
_GROWTH = 1.05
_WARM = 1000  # requests, after which memory must stay flat
_SECONDS = 60.0
_EXAMPLE = Path(__file__).parents[2] / "examples/dots1-tiny"
_DOTS1 = (sys.executable, "-c", "from dots1_local.cli import main; main()")
_SUBJECTS = ("cat", "dog", "girl", "boat", "bird", "tree", "king", "fish", "bear", "ball")
_LOOKS = ("little", "red", "happy", "old", "sad", "big", "brave", "quiet")


class Server:
    """A server process with the example model; `answers` are what it writes alone, by prompt."""

    def __init__(self, model: Path, log: Path) -> None:
        self._log, self._read = log, 0
        command = [*_DOTS1, "serve", str(model), "--port", "0", "-t", "1", "-c", "512"]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--parallel", "4", "--prompt-cache-ram", "4MiB"],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        atexit.register(self.process.kill)
        self.port = self._wait()
        self._asked, self._warm = 0, 0
        self.answers = dict(self._decisive())

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the answer to a request that is in order."""
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=_SECONDS)) as connection:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            found = json.loads(response.read())
            if response.status != 200:
                raise Broken(f"{path} answered {response.status}: {found!s:.200}")
            return found

    def check(self, asked: int) -> None:
        """Raise Broken if, after so many more requests, something does not hold any more."""
        self._settle()
        said, text = next(iter(self.answers.items()))
        if self.ask(said) != text:
            raise Broken("a request that follows got another answer")
        self._check_log()
        self._asked += asked
        private = self._private_bytes()
        if self._asked <= _WARM:
            self._warm = max(self._warm, private)
        elif self._warm and private > _GROWTH * self._warm:
            raise Broken(f"private memory grew from {self._warm:,} to {private:,} bytes")

    def ask(self, said: str) -> str:
        """Return the greedy answer to a message."""
        body = {"messages": [{"role": "user", "content": said}]}
        answer = self.post(PATHS["chat"], {**body, "temperature": 0, "max_tokens": LENGTH})
        return str(answer["choices"][0]["message"]["content"])

    def _decisive(self) -> Any:
        found = 0
        for look in _LOOKS:
            for subject in _SUBJECTS:
                said = f"Tell me a story about a {look} {subject}."
                body = {
                    "messages": [{"role": "user", "content": said}], "temperature": 0,
                    "max_tokens": LENGTH, "logprobs": True, "top_logprobs": 2,
                }  # fmt: skip
                choice = self.post(PATHS["chat"], body)["choices"][0]
                tops = [token["top_logprobs"] for token in choice["logprobs"]["content"]]
                lead = min((a["logprob"] - b["logprob"] for a, b in tops), default=math.inf)
                if lead > _DECISIVE and found < _PROMPTS:
                    found += 1
                    yield said, choice["message"]["content"]

    def _wait(self) -> int:
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            told = self._log.read_text(errors="replace")
            if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", told):
                return int(found[1])
            time.sleep(0.1)
        raise Broken(f"the server did not start: {self._log.read_text(errors='replace')[-300:]}")

    def _settle(self) -> None:
        """Wait until the answers of clients that left are cancelled."""
        deadline = time.monotonic() + _SECONDS
        load: Any = None
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise Broken(f"the server ended with status {self.process.returncode}")
            with closing(HTTPConnection("127.0.0.1", self.port, timeout=_SECONDS)) as connection:
                connection.request("GET", "/health")
                load = json.loads(connection.getresponse().read())
            if not load["running"] + load["waiting"]:
                return
            time.sleep(0.02)
        raise Broken(f"answers that nobody reads go on: {load}")

    def _check_log(self) -> None:
        with self._log.open(errors="replace") as log:
            log.seek(self._read)
            told = log.read()
            self._read = log.tell()
        if "Traceback" in told or "Error" in told:
            raise Broken(f"the server logged: {told[-600:]}")

    def _private_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+)", status)
        assert found
        return int(found[1]) << 10


@cache
def server(row: str) -> Server:
    """Return the server of a row of the table, which ends with this process."""
    return Server(_model(), _folder() / f"{row}.log")


@cache
def _folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="dots1-campaign-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def _model() -> Path:
    model = _folder() / "tiny.gguf"
    subprocess.run(
        [*_DOTS1, "convert", _EXAMPLE, "--type", "DQ4", "-o", model],
        check=True,
        capture_output=True,
    )
    return model


def text_of(kind: str, body: Any) -> str:
    """Return the text of a whole answer of an API."""
    readers: dict[str, Callable[[Any], str]] = {
        "chat": lambda found: found["choices"][0]["message"]["content"],
        "completions": lambda found: found["choices"][0]["text"],
        "messages": lambda found: "".join(block["text"] for block in found["content"]),
        "responses": lambda found: "".join(
            part["text"] for item in found["output"] for part in item["content"]
        ),
    }
    return readers[kind](body)


def check_error(path: str, status: int, body: bytes) -> None:
    """Raise Broken if an error does not have the shape of its API."""
    try:
        found = json.loads(body)
        inner = found["error"]
        anthropic = path.startswith("/v1/messages")
        wanted = {"type", "message"} if anthropic else {"message", "type", "param", "code"}
        right = set(inner) == wanted and inner["message"] and status >= 400
        right = right and (not anthropic or found["type"] == "error")
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise Broken(f"{path[:60]} answered {status} with {body[:200]!r}")
