"""`dots1 serve` and llama.cpp's own server, run side by side on one file.

llama-server is built from llama-cpp-python's sources, as tests/goldens/make_goldens.py says, with
-DLLAMA_BUILD_SERVER=ON.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

__all__ = ["add_arguments", "ours", "post", "serving", "theirs"]

_PORT = 18_080


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, llama-server and the threads of both."""
    parser.add_argument("model", type=Path, help="a dots1 GGUF file")
    parser.add_argument("stock", type=Path, help="llama-server")
    parser.add_argument("--threads", type=int, default=2)


def ours(options: argparse.Namespace, parallel: int, context: int, *more: object) -> list[str]:
    """The command that serves so many sequences of so many tokens each."""
    program = [sys.executable, "-c", "from dots1_local.cli import main; main()", "serve"]
    numbers = {"--port": _PORT, "--parallel": parallel, "-c": context}
    return _command([*program, str(options.model)], numbers, options, more)


def theirs(options: argparse.Namespace, parallel: int, context: int, *more: object) -> list[str]:
    """The command of llama-server for the same, in one shared KV cache."""
    program = [str(options.stock), "-m", str(options.model), "-kvu", "--no-webui"]
    numbers = {"--port": _PORT, "-np": parallel, "-c": parallel * context}
    return _command(program, numbers, options, more)


def _command(
    program: list[str],
    numbers: Mapping[str, int],
    options: argparse.Namespace,
    more: Sequence[object],
) -> list[str]:
    pairs = {**numbers, "-t": options.threads}
    return [*program, *(str(word) for pair in pairs.items() for word in pair), *map(str, more)]


@contextmanager
def serving(command: Sequence[str]) -> Iterator[None]:
    """Run a server until the block ends; the block begins when the model is loaded."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not _healthy():
            if server.poll() is not None:
                raise RuntimeError(f"{command[0]} ended with status {server.returncode}")
            time.sleep(0.2)
        yield
    finally:
        server.terminate()
        server.wait()


def _healthy() -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{_PORT}/health", timeout=5) as response:
            return bool(response.status == 200)
    except URLError:  # an error status, too
        return False


def post(path: str, body: Mapping[str, object]) -> Any:
    """Return the server's answer to a JSON body."""
    request = Request(
        f"http://127.0.0.1:{_PORT}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=3600) as response:
        return json.load(response)
