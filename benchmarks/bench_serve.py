"""Several answers at once against one after the other, and what a new request does to the others.

    python -m benchmarks.bench_serve build/dots1-tiny-DQ4.gguf
    python -m tools.make_gguf build/three.gguf --layers 3
    python -m benchmarks.bench_serve build/three.gguf --requests 8 --prompt 64 --answer 32

Straight on the scheduler, without HTTP. Prompts are random tokens and have nothing in common, the
same ones at every width; answers are all of one length, as end tokens are forbidden. The second
table: while all sequences but one write, a long prompt comes, and the writers' longest pause is
taken from then until its first token. The third: one answer's speed while the caches of all other
sequences are empty, or full. Give --threads as many cores as nobody else uses.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median
from threading import Event as Flag

from dots1_local.chat.sampling import Sampling
from dots1_local.engine.engine import Engine
from dots1_local.serve.generation import Event, Failed, Finished, GenerationRequest, Piece
from dots1_local.serve.scheduler import Scheduler


class Run:
    """A running request: when it began, and when each of its tokens came."""

    def __init__(self, scheduler: Scheduler, request: GenerationRequest) -> None:
        self.times: list[float] = []
        self._first, self._over = Flag(), Flag()
        self._failure = ""
        self.finished: Finished | None = None
        self.begun = time.perf_counter()
        self.handle = scheduler.submit([request], self._hear)

    def _hear(self, event: Event) -> None:
        if isinstance(event, Piece):
            self.times.append(time.perf_counter())
            self._first.set()
        if isinstance(event, Failed):
            self._failure = event.message
        if isinstance(event, Finished):
            self.finished = event
        if isinstance(event, Failed | Finished):
            self._first.set()
            self._over.set()

    def wait_for_first(self) -> None:
        self._wait(self._first)

    def wait(self) -> None:
        self._wait(self._over)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.begun

    def pauses(self, start: float, end: float) -> list[float]:
        """Seconds between tokens, where they overlap with this time."""
        return [
            after - before for before, after in pairwise(self.times) if after > start < end > before
        ]

    def _wait(self, flag: Flag) -> None:
        flag.wait()
        if self._failure:
            raise RuntimeError(self._failure)


class Bench:
    """A model, and requests that it can carry out."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.random = Random(0)
        self.n_ctx = max(options.prompt, options.long) + options.answer + 8
        with self.opened(1) as (_, engine):
            self._n_vocab = engine.n_vocab
            ends = [token for token in range(engine.n_vocab) if engine.is_end(token)]
        bias = tuple((token, -100.0) for token in ends)
        self._sampling = Sampling(temperature=0, logit_bias=bias)

    @contextmanager
    def opened(self, parallel: int) -> Iterator[tuple[Scheduler, Engine]]:
        with Engine.open(
            self.options.model,
            n_ctx=self.n_ctx,
            n_sequences=parallel,
            shared_cache=True,
            threads=self.options.threads,
        ) as engine:
            scheduler = Scheduler(engine, queue_size=10_000)
            try:
                yield scheduler, engine
            finally:
                scheduler.close(0)

    def request(self, prompt: int, answer: int | None = None) -> GenerationRequest:
        """A prompt of so many random tokens; the answer's length is the usual one, or as asked.

        Every token is heard of at once: its logprob comes even where its text does not.
        """
        tokens = self.random.choices(range(min(self._n_vocab, 100_000)), k=prompt)
        return GenerationRequest(
            tuple(tokens), self._sampling, max_tokens=answer or self.options.answer, top_logprobs=0
        )


def throughput(bench: Bench, widths: Sequence[int]) -> None:
    """All of the requests, submitted at once."""
    options = bench.options
    requests = [bench.request(options.prompt) for _ in range(options.requests)]
    print("| parallel | wall | written, all together | against sequential | first token, median |")
    print("|---|---|---|---|---|")
    sequential = 0.0
    for parallel in widths:
        with bench.opened(parallel) as (scheduler, _):
            start = time.perf_counter()
            runs = [Run(scheduler, request) for request in requests]
            for run in runs:
                run.wait()
            wall = time.perf_counter() - start
        speed = sum(len(run.times) for run in runs) / wall
        sequential = sequential or speed
        first = median(run.first for run in runs)
        print(
            f"| {parallel} | {wall:.2f} s | {speed:.2f} tok/s | {speed / sequential:.2f} "
            f"| {first:.2f} s |",
            flush=True,
        )


def disturbance(bench: Bench, parallel: int) -> None:
    """A long prompt comes while all sequences but one write."""
    with bench.opened(parallel) as (scheduler, _):
        alone = Run(scheduler, bench.request(bench.options.long, 1))
        alone.wait()
        writers = [Run(scheduler, bench.request(8, bench.n_ctx)) for _ in range(parallel - 1)]
        for writer in writers:
            writer.wait_for_first()
        begun = time.perf_counter()
        time.sleep(min(1.0, 2 * alone.first))
        new = Run(scheduler, bench.request(bench.options.long, 1))
        new.wait()
        for writer in writers:
            writer.handle.cancel()
    end = new.times[0]
    usual = median(p for w in writers for p in w.pauses(begun, new.begun))
    longest = max(p for w in writers for p in w.pauses(new.begun, end))
    print(
        f"| {parallel - 1} | {alone.first:.2f} s | {new.first:.2f} s | {usual * 1000:.0f} ms "
        f"| {longest * 1000:.0f} ms |",
        flush=True,
    )


def idle_caches(bench: Bench, parallel: int) -> None:
    """One answer while the caches of all other sequences are empty, and then full."""
    long = bench.n_ctx - bench.options.answer - 1
    with bench.opened(parallel) as (scheduler, _):
        speeds = []
        for fill in (False, True):
            if fill:
                fillers = [Run(scheduler, bench.request(long, 1)) for _ in range(parallel)]
                for filler in fillers:
                    filler.wait()
            run = Run(scheduler, bench.request(8))
            run.wait()
            speeds.append((len(run.times) - 1) / (run.times[-1] - run.times[0]))
    empty, full = speeds
    print(
        f"| {parallel - 1} × {long} | {empty:.2f} tok/s | {full:.2f} tok/s | {full / empty:.2f} |",
        flush=True,
    )


def main() -> None:
    """Print three Markdown tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a dots1 GGUF file")
    parser.add_argument("--parallel", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128, help="tokens [%(default)s]")
    parser.add_argument("--answer", type=int, default=64, help="tokens [%(default)s]")
    parser.add_argument("--long", type=int, default=512, help="the late prompt's tokens")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    bench = Bench(options)
    print(f"{options.requests} requests of {options.prompt} tokens, answers of {options.answer}\n")
    throughput(bench, options.parallel)
    several = [parallel for parallel in options.parallel if parallel > 1]
    print(f"\n| writers | {options.long} tokens read alone | beside them | pauses | longest |")
    print("|---|---|---|---|---|")
    for parallel in several:
        disturbance(bench, parallel)
    print("\n| idle caches | one answer, caches empty | full | ratio |\n|---|---|---|---|")
    for parallel in several:
        idle_caches(bench, parallel)


if __name__ == "__main__":
    main()
