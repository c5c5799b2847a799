"""lm_eval's evaluation of one model: its server runs in this process, on a port of its own."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error, readable
from dots1_local.evaluate.tasks.answers import Answer, AnswerFile, answer_key
from dots1_local.evaluate.tasks.catalog import TaskOptions, Tasks
from dots1_local.evaluate.tasks.estimate import (
    Estimate,
    count,
    in_order,
    new_tokens,
)
from dots1_local.evaluate.tasks.harness import NAME, Harness, Request
from dots1_local.progress import Progress
from dots1_local.serve.prompt_cache import PromptCache
from dots1_local.serve.run import ApiServer, bind, url_of

__all__ = ["evaluate"]

_BOOTSTRAP = 1000  # resamples, for metrics without a formula of their standard error


def evaluate(
    engine: Engine,
    tasks: Tasks,
    options: TaskOptions,
    answers: AnswerFile,
    estimate: Estimate,
    progress: Progress,
) -> dict[str, Any]:
    """Evaluate a model and return lm_eval's results, with the samples of each task.

    Answers that are known are not asked for again. `estimate` has the requests, by whose tokens
    progress is counted.

    Raises:
        Dots1Error: the server refuses a request or fails, or lm_eval cannot score the answers.
    """
    from lm_eval.evaluator import evaluate as run

    with _client(engine) as ask:
        missing = count(estimate.missing(answers))
        meter = Meter(missing.computed + missing.answer_tokens, progress)
        asker = Asker(ask, engine.params.n_sequences, answers, meter)
        harness = Harness(engine, engine.n_ctx, asker)
        results: dict[str, Any] = run(
            harness,
            tasks,
            limit=options.limit,
            bootstrap_iters=_BOOTSTRAP,
            **options.arguments(),
        )
        return results


@contextmanager
def _client(engine: Engine) -> Iterator[Callable[[Request], Any]]:
    """Serve an engine to this process alone, and yield what posts a request for its reply."""
    key = secrets.token_urlsafe(32)
    with (
        closing(bind("127.0.0.1", 0)) as listener,
        ApiServer(listener, NAME, api_key=key) as server,
    ):
        server.open(engine, 2 * engine.params.n_sequences, 0, PromptCache(engine, 0))
        headers = {"Authorization": f"Bearer {key}"}
        with httpx2.Client(headers=headers, timeout=None, trust_env=False) as client:
            url = f"{url_of(listener)}/completions"

            def ask(request: Request) -> Any:
                reply = client.post(url, json=request.body)
                if reply.is_error:
                    raise Dots1Error(f"the server refused a request: {_message(reply)}")
                return reply.json()

            try:
                yield ask
            finally:
                server.close(0)  # running requests end at once, so that the client can close


def _message(reply: httpx2.Response) -> str:
    try:
        return readable(str(reply.json()["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return f"status {reply.status_code}"


@dataclass
class Meter:
    """Counts the tokens of requests that were answered, of `total`."""

    total: int
    progress: Progress
    done: int = 0

    def add(self, tokens: int) -> None:
        """Report that a request with so many new tokens was answered."""
        self.done += tokens
        self.progress(min(self.done, self.total), self.total, "tokens", "")


class Asker:
    """Answers requests: from a file, or by asking for `parallel` of them at once."""

    def __init__(
        self, ask: Callable[[Request], Any], parallel: int, answers: AnswerFile, meter: Meter
    ) -> None:
        self._ask, self._parallel, self._answers, self._meter = ask, parallel, answers, meter

    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the answers in the order of the requests; equal requests are asked for once."""
        keys = [answer_key(each.body) for each in requests]
        by_key = dict(zip(keys, requests, strict=True))
        known = {key: self._answers.get(key) for key in by_key}
        missing = {id(by_key[key]): key for key, answer in known.items() if answer is None}
        ordered = in_order(by_key[key] for key in missing.values())
        for request, answer in self._asked(ordered):
            key = missing[id(request)]
            self._answers.put(key, answer)
            known[key] = answer
        found = [known[key] for key in keys]
        return [each for each in found if each is not None]

    def _asked(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer]]:
        """Yield the requests with their answers as they come."""
        pool = ThreadPoolExecutor(self._parallel)
        try:
            running: dict[Future[Any], tuple[Request, int]] = {
                pool.submit(self._ask, request): (request, new)
                for request, new in zip(requests, new_tokens(requests), strict=True)
            }
            for future in as_completed(running):
                request, new = running.pop(future)
                yield request, request.answer(future.result())
                self._meter.add(new + request.max_tokens)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
