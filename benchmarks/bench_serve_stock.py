"""`dots1 serve` beside llama.cpp's own server: the same requests over HTTP, all sent at once.

    python -m tools.make_gguf build/three.gguf --layers 3
    python -m benchmarks.bench_serve_stock build/three.gguf PATH/TO/llama-server

Both get the same file, threads, sequences and context, in one shared KV cache. Prompts are random
tokens and have nothing in common, end tokens are forbidden, and answers are the likeliest tokens.
`servers` says how llama-server is built.
"""

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random

from benchmarks.servers import add_arguments, ours, post, serving, theirs
from dots1_local.files.gguf import GGUFFile


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
        context = options.prompt + options.answer + 8
        own = _speed(ours(options, parallel, context), bodies)
        stock = _speed(theirs(options, parallel, context), bodies)
        print(
            f"| {parallel} | {own:.2f} tok/s | {stock:.2f} tok/s | {own / stock:.2f} |",
            flush=True,
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--parallel", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens [64]")
    parser.add_argument("--answer", type=int, default=32, help="tokens [32]")
    return parser.parse_args()


def _speed(command: Sequence[str], bodies: Sequence[dict[str, object]]) -> float:
    """Tokens written a second, all requests together."""
    with serving(command), ThreadPoolExecutor(len(bodies)) as pool:
        list(pool.map(_ask, bodies[:1]))  # weights come from the disk
        start = time.perf_counter()
        written = sum(pool.map(_ask, bodies))
        return written / (time.perf_counter() - start)


def _ask(body: dict[str, object]) -> int:
    return int(post("/v1/completions", body)["usage"]["completion_tokens"])


if __name__ == "__main__":
    main()
