"""GET /metrics: what the server has done, in Prometheus' text format."""

import time
from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from dots1_local.serve.generation import Event, Failed, Finished, Piece
from dots1_local.serve.scheduler import Scheduler

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_GAUGES: dict[str, tuple[str, Callable[[Scheduler], float]]] = {
    "running": ("Answers that are generated.", lambda it: it.load.running),
    "waiting": ("Answers that wait.", lambda it: it.load.waiting),
    "slots": ("Answers that can be generated at once.", lambda it: it.load.slots),
    "cache_ram_bytes": ("RAM that earlier prompts take.", lambda it: it.cache.ram_used),
    "cache_disk_bytes": ("Disk that earlier prompts take.", lambda it: it.cache.disk_used),
    "restored_tokens": ("Tokens that came from them.", lambda it: it.cache.restored_tokens),
}


class Metrics:
    """Counters and times of all answers, and what the `scheduler` does when they are asked for.

    Threads may use it at once.
    """

    def __init__(self, scheduler: Callable[[], Scheduler | None]) -> None:
        self._registry = CollectorRegistry()
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts, cached ones included.")
        self._cached = self._counter("cached_tokens", "Tokens of prompts that were cached.")
        self._written = self._counter("generated_tokens", "Tokens of answers.")
        self._drafted = self._counter("drafted_tokens", "Tokens of drafts.")
        self._accepted = self._counter("accepted_tokens", "Tokens of drafts that were right.")
        self._ended = Counter(
            "dots1_answers",
            "Answers that ended: by themselves or a stop string, at a length, or by a failure.",
            ["reason"],
            registry=self._registry,
        )
        self._first = self._histogram("first_token_seconds", "Until an answer's first token.")
        self._whole = self._histogram("answer_seconds", "Until an answer ended.")
        for name, (about, figure) in _GAUGES.items():
            gauge = Gauge(f"dots1_{name}", about, registry=self._registry)
            gauge.set_function(partial(_figure, scheduler, figure))

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(f"dots1_{name}", about, registry=self._registry)

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(f"dots1_{name}", about, buckets=_SECONDS, registry=self._registry)

    def observer(self) -> Callable[[Event], None]:
        """Return what is to be called with each event of a request that begins now."""
        start, begun = time.monotonic(), set[int]()

        def observe(event: Event) -> None:
            seconds = time.monotonic() - start
            if isinstance(event, Failed):
                self._ended.labels("failure").inc()
            elif isinstance(event, Finished):
                self._count(event)
                self._whole.observe(seconds)
            elif isinstance(event, Piece) and event.index not in begun:
                begun.add(event.index)
                self._first.observe(seconds)

        return observe

    def _count(self, finished: Finished) -> None:
        self._prompt.inc(finished.prompt_tokens)
        self._cached.inc(finished.cached_tokens)
        self._written.inc(finished.completion_tokens)
        self._drafted.inc(finished.drafted_tokens)
        self._accepted.inc(finished.accepted_tokens)
        self._ended.labels(finished.reason).inc()

    def text(self) -> bytes:
        """Return all figures."""
        return generate_latest(self._registry)


def _figure(
    scheduler: Callable[[], Scheduler | None], figure: Callable[[Scheduler], float]
) -> float:
    """Return a figure of the scheduler, or 0 before there is one."""
    found = scheduler()
    return figure(found) if found else 0
