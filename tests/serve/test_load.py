"""Many clients of all APIs at once, of which some disconnect and some send invalid requests."""

import json
import math
import random
import shutil
import socket
import struct
from codecs import getincrementaldecoder
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dots1_local.engine.engine import Engine
from tests.helpers import TOKENS, all_logits, random_tensors, until, write_random_gguf
from tests.serve.scheduling import log_softmax
from tests.serve.served import Served, connect

REQUESTS, AT_ONCE = 500, 32
PROMPTS, CHATS = 40, 10
LENGTH = 24  # tokens of an answer
DECISIVE = 0.02
GROWTH = 16 << 20  # bytes
CONTEXT = 1024  # tokens; descriptions of tools are long
TOOL_SCHEMA = {
    "type": "object",
    "properties": {"letter": {"enum": ["a", "b"]}},
    "required": ["letter"],
}
JSON = {"Content-Type": "application/json"}
MALFORMED = (
    b"{",
    b"[1, 2]",
    b'{"prompt": NaN}',
    b'{"prompt": "\xff"}',
    b'{"prompt": ' + b"[" * 5000,
    b'{"prompt": "hi", "max_tokens": -1}',
    b'{"prompt": [1000000]}',
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights: each token depends on all tokens before it.

    The experts of a layer are equal, because rounding may change which of them are chosen.
    """
    experts = {name: each for name, each in random_tensors().items() if "_exps" in name}
    tensors = {name: np.repeat(each[:1], len(each), axis=0) for name, each in experts.items()}
    return write_random_gguf(tmp_path_factory.mktemp("load") / "model.gguf", tensors=tensors)


@pytest.fixture(scope="module")
def answers(model: Path) -> dict[tuple[int, ...], str]:
    """Prompts and their greedy answers, each computed alone.

    Rounding differs with the ubatch, so only answers are kept that rounding cannot change.
    """
    rng = random.Random(0)
    common = [rng.randrange(256) for _ in range(50)]
    found: dict[tuple[int, ...], str] = {}
    with Engine.open(model, n_ctx=256, threads=1) as engine:
        while len(found) < PROMPTS:
            prompt = (*common[: rng.randrange(51)], *(rng.randrange(256) for _ in range(9)))
            text, lead = written(engine, prompt)
            if lead > DECISIVE:
                found[prompt] = text
    return found


def written(engine: Engine, prompt: tuple[int, ...]) -> tuple[str, float]:
    """Return the answer, and the smallest difference of the two largest logits."""
    engine.forget()
    tokens, text, lead = list(prompt), b"", math.inf
    logits = engine.decode(prompt, 0)
    while True:
        second, token = np.argsort(logits)[-2:].tolist()
        lead = min(lead, float(logits[token] - logits[second]))
        if engine.is_end(token):
            break
        text += engine.piece(token)
        tokens.append(token)
        if len(tokens) == len(prompt) + LENGTH:
            break
        logits = engine.decode([token], len(tokens) - 1)
    return getincrementaldecoder("utf-8")("replace").decode(
        text
    ), lead  # without an incomplete character at the end


@pytest.fixture(scope="module")
def chats(model: Path) -> dict[str, str]:
    """What a user says, and the greedy answer, computed alone from the template's own tokens."""
    rng = random.Random(1)
    found: dict[str, str] = {}
    with Engine.open(model, n_ctx=256, threads=1) as engine:
        while len(found) < CHATS:
            said = "".join(rng.choices("0123456789", k=30))
            text, lead = written(engine, tuple(rendered(said)))
            if lead > DECISIVE:
                found[said] = text
    return found


def rendered(said: str) -> list[int]:
    """A conversation with the system message "0"; digits are a token each."""
    marks = [TOKENS.index(f"<|{name}|>") for name in (
        "system", "endofsystem", "userprompt", "endofuserprompt", "response",
    )]  # fmt: skip
    return [marks[0], *b"0", *marks[1:3], *said.encode(), *marks[3:]]


@pytest.fixture(scope="module")
def logprobs(
    model: Path, answers: dict[tuple[int, ...], str]
) -> dict[tuple[int, ...], list[float]]:
    """The logprobs of all tokens of the prompts but the first."""
    found = {}
    with Engine.open(model, n_ctx=256, threads=1, all_logits=True) as engine:
        for prompt in answers:
            engine.forget()
            rows = log_softmax(all_logits(engine, list(prompt)))
            found[prompt] = [
                float(row[token]) for row, token in zip(rows, prompt[1:], strict=False)
            ]
    return found


class Clients:
    """Each call of `one` is a client; `seen` counts the clients of each kind."""

    def __init__(
        self,
        port: int,
        answers: dict[tuple[int, ...], str],
        chats: dict[str, str],
        logprobs: dict[tuple[int, ...], list[float]],
    ) -> None:
        self._port, self._answers, self._chats, self._logprobs = port, answers, chats, logprobs
        self.seen: Counter[str] = Counter()

    def one(self, seed: int) -> None:
        rng = random.Random(seed)
        kinds = {
            self._whole: 6, self._stream: 6, self._disconnect: 4, self._send_invalid: 4,
            self._send_garbage: 1, self._score: 4, self._message: 4, self._response: 4,
            self._call: 2,
        }  # fmt: skip
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        kind(rng)
        self.seen[kind.__name__] += 1

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        with closing(connect(self._port)) as connection:
            connection.request("POST", path, json.dumps(body), JSON)
            response = connection.getresponse()
            found = json.loads(response.read())
            assert response.status == 200, found
            return found

    def _score(self, rng: random.Random) -> None:
        """Ask for the logprobs of a prompt, and sometimes for an answer too."""
        prompt, length = rng.choice(list(self._answers)), rng.choice([0, LENGTH])
        asked = {"prompt": prompt, "max_tokens": length, "temperature": 0, "echo": True}
        found = self._post("/v1/completions", {**asked, "logprobs": 2})["choices"][0]
        first, *rest = found["logprobs"]["token_logprobs"]
        assert first is None
        assert rest[: len(prompt) - 1] == pytest.approx(self._logprobs[prompt], abs=2e-2)
        if length:
            assert found["text"].endswith(self._answers[prompt])

    def _message(self, rng: random.Random) -> None:
        said = rng.choice(list(self._chats))
        body = {
            "model": "dots1", "max_tokens": LENGTH, "temperature": 0, "system": "0",
            "messages": [{"role": "user", "content": said}],
        }  # fmt: skip
        found = self._post("/v1/messages", body)
        assert "".join(block["text"] for block in found["content"]) == self._chats[said]

    def _response(self, rng: random.Random) -> None:
        said = rng.choice(list(self._chats))
        body = {"instructions": "0", "input": said, "max_output_tokens": LENGTH, "temperature": 0}
        [item] = self._post("/v1/responses", body)["output"]
        assert "".join(part["text"] for part in item["content"]) == self._chats[said]

    def _call(self, rng: random.Random) -> None:
        said = rng.choice(list(self._chats))
        tool = {"name": "pick", "description": "Pick.", "parameters": TOOL_SCHEMA}
        body = {
            "messages": [{"role": "user", "content": said}], "temperature": 0, "max_tokens": 200,
            "tools": [{"type": "function", "function": tool}], "tool_choice": "required",
        }  # fmt: skip
        calls = self._post("/v1/chat/completions", body)["choices"][0]["message"]["tool_calls"]
        for call in calls:
            assert call["function"]["name"] == "pick"
            assert json.loads(call["function"]["arguments"]) in ({"letter": "a"}, {"letter": "b"})

    def _ask(self, connection: Any, rng: random.Random, stream: bool) -> tuple[int, ...]:
        prompt = rng.choice(list(self._answers))
        asked = {"prompt": prompt, "max_tokens": LENGTH, "temperature": 0, "stream": stream}
        connection.request("POST", "/v1/completions", json.dumps(asked), JSON)
        return prompt

    def complete(self, prompt: tuple[int, ...]) -> Any:
        return self._post(
            "/v1/completions", {"prompt": prompt, "max_tokens": LENGTH, "temperature": 0}
        )

    def _whole(self, rng: random.Random) -> None:
        with closing(connect(self._port)) as connection:
            prompt = self._ask(connection, rng, stream=False)
            response = connection.getresponse()
            found = json.loads(response.read())
            assert response.status == 200, found
        assert found["choices"][0]["text"] == self._answers[prompt]

    def _stream(self, rng: random.Random) -> None:
        with closing(connect(self._port)) as connection:
            prompt = self._ask(connection, rng, stream=True)
            *chunks, end = events(connection.getresponse())
        assert end == "[DONE]"
        text = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
        assert text == self._answers[prompt]

    def _disconnect(self, rng: random.Random) -> None:
        """Disconnect before or during the answer, with a FIN or a RST."""
        with closing(connect(self._port)) as connection:
            stream = rng.random() < 0.5
            self._ask(connection, rng, stream)
            if rng.random() < 0.5:
                connection.sock.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
            if stream:
                with closing(connection.getresponse()) as response:
                    response.read(rng.randrange(1, 600))

    def _send_garbage(self, rng: random.Random) -> None:
        """Send bytes that are not HTTP."""
        with socket.create_connection(("127.0.0.1", self._port), timeout=60) as connection:
            connection.sendall(rng.randbytes(99) + b"\r\n\r\n")
            assert b" 400 " in connection.recv(1 << 16)

    def _send_invalid(self, rng: random.Random) -> None:
        with closing(connect(self._port)) as connection:
            connection.request("POST", "/v1/completions", rng.choice(MALFORMED), JSON)
            response = connection.getresponse()
            assert response.status == 400
            assert json.loads(response.read())["error"]["message"]


def events(response: Any) -> Iterator[str]:
    for line in response:
        if line.startswith(b"data: "):
            yield line.decode().removeprefix("data: ").strip()


def resident(pid: int) -> int:
    """Return the bytes of private memory of a process."""
    [line] = [
        line for line in Path(f"/proc/{pid}/status").read_text().split("\n") if "RssAnon" in line
    ]
    return int(line.split()[1]) << 10


@pytest.mark.slow
def test_answers_are_right_and_memory_stays_flat(
    model: Path,
    answers: dict[tuple[int, ...], str],
    chats: dict[str, str],
    logprobs: dict[tuple[int, ...], list[float]],
    tmp_path: Path,
) -> None:
    disk = tmp_path / "prompts"
    small = (
        "--prompt-cache-ram",
        "1MiB",
        "--prompt-cache",
        str(disk),
        "--prompt-cache-size",
        "2MiB",
    )
    with Served(model, "--parallel", "4", "-c", str(CONTEXT), *small) as server:
        clients = Clients(server.port, answers, chats, logprobs)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(clients.one, range(REQUESTS // 5)))
            before = resident(server.process.pid)
            list(pool.map(clients.one, range(REQUESTS // 5, REQUESTS // 2)))
            shutil.rmtree(disk, ignore_errors=True)
            list(pool.map(clients.one, range(REQUESTS // 2, REQUESTS)))
        assert resident(server.process.pid) < before + GROWTH
        assert sum(clients.seen.values()) == REQUESTS
        assert len(clients.seen) == 9
        until(lambda: not json.loads(server.get("/health")[1])["running"])  # cancelled answers
        clients.one(0)
        assert sum(path.stat().st_size for path in disk.glob("*/*")) <= 2 << 20


def test_a_beginning_that_many_clients_share_is_computed_once(model: Path, tmp_path: Path) -> None:
    rng = random.Random(2)
    common = [rng.randrange(256) for _ in range(200)]
    prompts = [(*common, *(rng.randrange(256) for _ in range(9))) for _ in range(64)]
    with Engine.open(model, n_ctx=512, threads=1) as engine:
        expected = [written(engine, prompt) for prompt in prompts]
    with (
        Served(model, "--parallel", "8", "-c", "512", "--queue", "64") as server,
        ThreadPoolExecutor(64) as pool,
    ):
        clients = Clients(server.port, {}, {}, {})
        found = list(pool.map(clients.complete, prompts))
    for (text, lead), reply in zip(expected, found, strict=True):
        assert reply["choices"][0]["text"] == text or lead <= DECISIVE
    cached = [reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in found]
    assert sorted(cached)[1] >= 200
