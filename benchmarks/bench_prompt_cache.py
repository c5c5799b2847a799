"""Seconds to the first token of a long prompt: computed, from RAM and from disk.

    python -m tools.make_gguf build/four.gguf --layers 4
    python -m benchmarks.bench_prompt_cache build/four.gguf PATH/TO/llama-server

The same requests go to `dots1 serve` and to llama-server, each with one sequence: a long prompt, a
short one that takes its place, and the long one again, which then comes from RAM. The server ends,
the files leave the system's page cache, and after a short prompt, which maps the weights, the long
one comes a third time, from disk. For that llama-server is told to save and to restore its slot, by
requests of their own; their time counts.
`servers` says how llama-server is built.
"""

import argparse
import os
import time
from collections.abc import Iterable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from benchmarks.servers import add_arguments, ours, post, serving, theirs

_SLOT = "slot.bin"


def main() -> None:
    """Print a Markdown table."""
    options = _options()
    random = Random(0)
    long, short = (random.choices(range(3_000), k=count) for count in (options.prompt, 64))
    print("| | computed | a short prompt then | from RAM | from disk | files | read alone |")
    print("|---|---|---|---|---|---|---|")
    with TemporaryDirectory(dir=options.folder) as folder:
        _print("dots1 serve", *_ours(options, Path(folder), long, short))
    with TemporaryDirectory(dir=options.folder) as folder:
        _print("llama-server", *_theirs(options, Path(folder), long, short))


def _ours(
    options: argparse.Namespace, folder: Path, long: list[int], short: list[int]
) -> tuple[list[float], list[Path]]:
    command = ours(options, 1, options.prompt + 72, "--prompt-cache", folder)
    with serving(command):
        seconds = [_first_token(prompt) for prompt in (long, short, long)]
    files = sorted(folder.glob("*/*.kv"))
    _drop_from_page_cache(files)
    with serving(command):
        _first_token(short)
        return [*seconds, _first_token(long)], files


def _theirs(
    options: argparse.Namespace, folder: Path, long: list[int], short: list[int]
) -> tuple[list[float], list[Path]]:
    command = theirs(options, 1, options.prompt + 72, "--slot-save-path", folder)
    with serving(command):
        seconds = [_first_token(prompt) for prompt in (long, short, long)]
        post("/slots/0?action=save", {"filename": _SLOT})
    files = [folder / _SLOT]
    _drop_from_page_cache(files)
    with serving(command):
        _first_token(short)
        start = time.perf_counter()
        post("/slots/0?action=restore", {"filename": _SLOT})
        _first_token(long)
        return [*seconds, time.perf_counter() - start], files


def _first_token(prompt: list[int]) -> float:
    start = time.perf_counter()
    post("/v1/completions", {"prompt": prompt, "max_tokens": 1, "temperature": 0})
    return time.perf_counter() - start


def _print(name: str, seconds: Iterable[float], files: list[Path]) -> None:
    nbytes = sum(path.stat().st_size for path in files)
    _drop_from_page_cache(files)
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    alone = time.perf_counter() - start
    cells = " | ".join(f"{each:.2f} s" for each in (*seconds,))
    print(f"| {name} | {cells} | {nbytes / 1e6:.0f} MB | {alone:.2f} s |", flush=True)


def _drop_from_page_cache(files: Iterable[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--prompt", type=int, default=8192, help="tokens [8192]")
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder if not")
    return parser.parse_args()


if __name__ == "__main__":
    main()
