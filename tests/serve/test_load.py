"""Many clients at once, of which some disconnect and some send invalid requests."""

import json
import math
import random
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
from tests.helpers import random_tensors, write_random_gguf
from tests.serve.served import Served, connect

REQUESTS, AT_ONCE = 500, 32
PROMPTS = 40
LENGTH = 24  # tokens of an answer
DECISIVE = 0.02
GROWTH = 16 << 20  # bytes
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


class Clients:
    """Each call of `one` is a client; `seen` counts the clients of each kind."""

    def __init__(self, port: int, answers: dict[tuple[int, ...], str]) -> None:
        self._port, self._answers = port, answers
        self.seen: Counter[str] = Counter()

    def one(self, seed: int) -> None:
        rng = random.Random(seed)
        kind = rng.choices(
            [self._whole, self._stream, self._disconnect, self._send_invalid, self._send_garbage],
            [10, 10, 4, 4, 1],
        )[0]
        kind(rng)
        self.seen[kind.__name__] += 1

    def _ask(self, connection: Any, rng: random.Random, stream: bool) -> tuple[int, ...]:
        prompt = rng.choice(list(self._answers))
        asked = {"prompt": prompt, "max_tokens": LENGTH, "temperature": 0, "stream": stream}
        connection.request("POST", "/v1/completions", json.dumps(asked), JSON)
        return prompt

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
    model: Path, answers: dict[tuple[int, ...], str]
) -> None:
    with Served(model, "--parallel", "4", "-c", "256") as server:
        clients = Clients(server.port, answers)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(clients.one, range(REQUESTS // 5)))
            before = resident(server.process.pid)
            list(pool.map(clients.one, range(REQUESTS // 5, REQUESTS)))
        assert resident(server.process.pid) < before + GROWTH
        assert sum(clients.seen.values()) == REQUESTS
        assert len(clients.seen) == 5
        while json.loads(server.get("/health")[1])["running"]:  # wait for cancelled answers
            pass
        clients.one(0)
