"""What drafts gain: the time of ubatches by their size, and answers with and without drafts.

    python -m tools.make_gguf build/three.gguf --layers 3 --vocab 32000
    python -m benchmarks.bench_draft build/three.gguf
    python -m benchmarks.bench_draft build/dots1-tiny-DQ4.gguf --text README.md

The first table: a draft pays if more than the given share of its tokens is right. The second
table: tokens a second of answers from a scheduler with one slot, the median of rounds in which the
kinds of drafts take turns. A model of random weights does not copy, so its answers are given: each
token is sampled, and then replaced by that of the script. In the "edit" the answer is the document
in the prompt, with another token every `--every` tokens; in the "new text" nothing repeats. With
--text the model writes itself, at temperature 0, after the beginning of a text and half of that
again, so that a model that copies goes on with the other half.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from benchmarks.bench_serve import Run
from dots1_local.chat.draft import Draft, longest_draft
from dots1_local.chat.sampler import Sampler
from dots1_local.chat.sampling import Sampling
from dots1_local.engine.engine import Engine
from dots1_local.serve.generation import Finished, GenerationRequest
from dots1_local.serve.scheduler import Scheduler

_SIZES = (1, 2, 4, 8, 16, 31)  # tokens of a ubatch
_REPEATS = 5


@dataclass(frozen=True)
class Turn:
    """A prompt, and the answer that is given or (None) written by the model."""

    name: str
    prompt: tuple[int, ...]
    script: tuple[int, ...] | None


def step_times(engine: Engine, depth: int, random: Random) -> None:
    """Time ubatches of random tokens after `depth` others."""
    context = random.choices(range(min(engine.n_vocab, 100_000)), k=depth)
    engine.forget()
    engine.decode(context, 0)
    print("| tokens at once | time | relative to one | a draft pays from |\n|---|---|---|---|")
    single = 0.0
    for size in _SIZES:
        seconds = []
        for _ in range(_REPEATS):
            tokens = random.choices(range(min(engine.n_vocab, 100_000)), k=size)
            start = time.perf_counter()
            engine.decode(tokens, depth, drafted=size - 1)
            seconds.append(time.perf_counter() - start)
            engine.forget(depth)
        single = single or median(seconds)
        relative = median(seconds) / single
        pays = f"{(relative - 1) / (size - 1):.0%}" if size > 1 else ""
        print(f"| {size} | {median(seconds) * 1000:.1f} ms | {relative:.2f} | {pays} |", flush=True)
    engine.forget()


def given_turns(engine: Engine, options: argparse.Namespace, random: Random) -> list[Turn]:
    """An edited copy of the prompt, and a text without repetition."""
    words = [t for t in range(min(engine.n_vocab, 100_000)) if not engine.is_end(t)]
    document = random.sample(words, options.answer)
    edited = list(document)
    for place in range(options.every // 2, options.answer, options.every):
        edited[place] = random.choice(words)
    new = tuple(random.sample(words, options.answer))
    prompt = tuple(document)
    return [Turn("edit", prompt, tuple(edited)), Turn("new text", prompt, new)]


def own_turn(engine: Engine, path: Path, length: int) -> Turn:
    """The model's own answer to a text of `length` tokens that has begun anew."""
    tokens = engine.tokenize(path.read_text(encoding="utf-8"), special=False)[:length]
    return Turn("its own", (*tokens, *tokens[: length // 2]), None)


@contextmanager
def scripted(script: Sequence[int] | None) -> Iterator[None]:
    """Let samplers choose the tokens of the script, after they have sampled."""
    if script is None:
        yield
        return
    sample, left = Sampler.next, iter(script)

    def choose(self: Sampler, engine: Engine, index: int = -1) -> int:
        sample(self, engine, index)
        return next(left)

    changed: Any = Sampler
    changed.next = choose
    try:
        yield
    finally:
        changed.next = sample


def speed(engine: Engine, turn: Turn, draft: Draft, length: int) -> tuple[float, Finished]:
    """Tokens a second after the first one, of one answer."""
    scheduler = Scheduler(engine, draft=draft)
    try:
        for answer in (min(length, 8), length):  # the first one reads the prompt
            request = GenerationRequest(
                turn.prompt, Sampling(temperature=0), max_tokens=answer, top_logprobs=0
            )
            with scripted(turn.script):
                run = Run(scheduler, request)
                run.wait()
    finally:
        scheduler.close(0)
    assert run.finished
    return (len(run.times) - 1) / (run.times[-1] - run.times[0]), run.finished


def main() -> None:
    """Print two Markdown tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a dots1 GGUF file")
    parser.add_argument("--text", type=Path, help="a text that the model may copy")
    parser.add_argument("--drafts", nargs="+", default=["off", "auto", "30"])
    parser.add_argument("--answer", type=int, default=200, help="tokens [%(default)s]")
    parser.add_argument("--every", type=int, default=100, help="tokens to an edit [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    named: dict[str, Draft] = {"off": 0, "auto": "auto"}
    drafts = {name: named.get(name) or int(name.replace("off", "0")) for name in options.drafts}
    room = max(longest_draft(draft) for draft in (*drafts.values(), _SIZES[-1] - 1))
    random = Random(0)
    with Engine.open(options.model, n_ctx=2048, threads=options.threads, n_draft=room) as engine:
        # OpenMP's workers wait busily for the thread they belong to, until that thread ends.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(step_times, engine, options.answer, random).result()
        turns = (
            [own_turn(engine, options.text, options.answer)]
            if options.text
            else given_turns(engine, options, random)
        )
        print("\n| answer | draft | speed | rounds | drafted | right |\n|---|---|---|---|---|---|")
        for turn in turns:
            found: dict[str, list[float]] = {name: [] for name in drafts}
            last: dict[str, Finished] = {}
            for _ in range(options.rounds):
                for name, draft in drafts.items():
                    each, last[name] = speed(engine, turn, draft, options.answer)
                    found[name].append(each)
            for name, speeds in found.items():
                rounds = ", ".join(f"{each:.1f}" for each in speeds)
                end = last[name]
                print(
                    f"| {turn.name} | {name} | {median(speeds):.1f} tok/s | {rounds} "
                    f"| {end.drafted_tokens} | {end.accepted_tokens} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
