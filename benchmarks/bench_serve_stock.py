"""`dots1 serve` beside llama.cpp's own server: the same requests over HTTP, all sent at once.

    python -m tools.make_gguf build/three.gguf --layers 3
    python -m benchmarks.bench_serve_stock build/three.gguf PATH/TO/llama-server

Both get the same file, threads, sequences and context, in one shared KV cache. Prompts are random
tokens and have nothing in common, end tokens are forbidden, and answers are the likeliest tokens.
llama-server is built from llama-cpp-python's sources, as tests/goldens/make_goldens.py says, with
-DLLAMA_BUILD_SERVER=ON.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from urllib.error import URLError
from urllib.request import Request, urlopen

from dots1_local.files.gguf import GGUFFile

_PORT = 18_080


def main() -> None:
    """Print a Markdown table."""
    options = _options()
    gguf = GGUFFile.open(options.model)
    ends = {str(gguf.keys[f"tokenizer.ggml.{end}_token_id"]): -100 for end in ("eos", "eot")}
    random = Random(0)
    bodies = [
        {
            "prompt": random.choices(range(3_000), k=options.prompt),
            "max_tokens": options.answer,
            "temperature": 0,
            "logit_bias": ends,
        }
        for _ in range(options.requests)
    ]
    print("| parallel | ours | llama-server | ours / theirs |")
    print("|---|---|---|---|")
    for parallel in options.parallel:
        ours = _speed(_ours(options, parallel), bodies)
        theirs = _speed(_theirs(options, parallel), bodies)
        print(
            f"| {parallel} | {ours:.2f} tok/s | {theirs:.2f} tok/s | {ours / theirs:.2f} |",
            flush=True,
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a dots1 GGUF file")
    parser.add_argument("stock", type=Path, help="llama-server")
    parser.add_argument("--parallel", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens [64]")
    parser.add_argument("--answer", type=int, default=32, help="tokens [32]")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _context(options: argparse.Namespace) -> int:
    return int(options.prompt + options.answer + 8)


def _ours(options: argparse.Namespace, parallel: int) -> list[str]:
    program = [sys.executable, "-c", "from dots1_local.cli import main; main()", "serve"]
    numbers = {"--port": _PORT, "--parallel": parallel, "-c": _context(options)}
    return _command([*program, str(options.model)], numbers, options)


def _theirs(options: argparse.Namespace, parallel: int) -> list[str]:
    program = [str(options.stock), "-m", str(options.model), "-kvu", "--no-webui"]
    numbers = {"--port": _PORT, "-np": parallel, "-c": parallel * _context(options)}
    return _command(program, numbers, options)


def _command(program: list[str], numbers: dict[str, int], options: argparse.Namespace) -> list[str]:
    pairs = {**numbers, "-t": options.threads}
    return [*program, *(word for name, value in pairs.items() for word in (name, str(value)))]


def _speed(command: Sequence[str], bodies: Sequence[dict[str, object]]) -> float:
    """Tokens written a second, all requests together."""
    with _serving(command), ThreadPoolExecutor(len(bodies)) as pool:
        list(pool.map(_ask, bodies[:1]))  # weights come from the disk
        start = time.perf_counter()
        written = sum(pool.map(_ask, bodies))
        return written / (time.perf_counter() - start)


@contextmanager
def _serving(command: Sequence[str]) -> Iterator[None]:
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


def _ask(body: dict[str, object]) -> int:
    request = Request(
        f"http://127.0.0.1:{_PORT}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=600) as response:
        return int(json.load(response)["usage"]["completion_tokens"])


if __name__ == "__main__":
    main()
