"""What an evaluation will ask, counted before the model is loaded, and how long that takes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from dots1_local.engine.engine import Vocabulary
from dots1_local.evaluate.tasks.answers import Answer, AnswerFile, answer_key
from dots1_local.evaluate.tasks.catalog import TaskOptions, Tasks
from dots1_local.evaluate.tasks.harness import Harness, Request
from dots1_local.placement.speed_model import SpeedModel
from dots1_local.progress import Progress, silent

__all__ = [
    "Count", "Estimate", "count", "estimate", "in_order", "new_tokens", "seconds",
]  # fmt: skip


@dataclass(frozen=True)
class Count:
    """Requests, and their tokens: of all prompts, and at most of the answers.

    `computed` tokens of prompts remain if what several of them begin with is computed once.
    `cut` prompts are longer than the context and lose their beginning.
    """

    requests: int
    prompt_tokens: int
    computed: int
    answer_tokens: int
    cut: int


@dataclass(frozen=True)
class Estimate:
    """Counts by task, and the requests of all tasks by their hash; equal ones are asked once."""

    by_task: Mapping[str, Count]
    requests: Mapping[str, Request] = field(repr=False)

    def missing(self, answers: AnswerFile) -> list[Request]:
        """The requests that are not answered yet, in the order in which they are asked.

        Raises:
            Dots1Error: the answers cannot be read.
        """
        return in_order(each for key, each in self.requests.items() if answers.get(key) is None)


def estimate(
    vocabulary: Vocabulary,
    n_ctx: int,
    tasks: Tasks,
    options: TaskOptions,
    progress: Progress = silent,
) -> Estimate:
    """Make all requests, and count them by task.

    Raises:
        UsageError: a text that is scored as a whole does not fit the context.
    """
    requests: list[Request] = []

    def record(asked: Sequence[Request]) -> list[Answer]:
        requests.extend(asked)
        return ["" if each.context is None else (0.0, False) for each in asked]

    harness = Harness(vocabulary, n_ctx, record)
    by_task: dict[str, Count] = {}
    every: dict[str, Request] = {}
    for number, (name, task) in enumerate(tasks["tasks"].items(), 1):
        requests.clear()
        _ask(harness, task, options)
        progress(number, len(tasks["tasks"]), "tasks", name)
        unique = {answer_key(each.body): each for each in requests}
        by_task[name] = count(in_order(unique.values()))
        every.update(unique)
    return Estimate(by_task, every)


def _ask(harness: Harness, task: Any, options: TaskOptions) -> None:
    """Let lm_eval make the requests of a task as it will when it evaluates."""
    from lm_eval.evaluator_utils import get_sample_size

    task.build_all_requests(
        limit=get_sample_size(task, options.limit),
        chat_template=harness.apply_chat_template if options.chat_template else None,
        **options.arguments(),
    )
    by_kind: dict[str, list[Any]] = {}
    for instance in task.instances:
        by_kind.setdefault(instance.request_type, []).extend([instance] * instance.repeats)
    for kind, instances in by_kind.items():
        getattr(harness, kind)(instances)


def in_order(requests: Iterable[Request]) -> list[Request]:
    """Sort requests so that those that begin alike follow one another, and writing comes last."""
    return sorted(requests, key=lambda each: (each.context is None, each.tokens))


def new_tokens(requests: Sequence[Request]) -> list[int]:
    """For each request in order, the tokens that the one before does not begin with."""
    found: list[int] = []
    before: list[int] = []
    for request in requests:
        tokens = request.tokens
        common = next(
            (n for n, (a, b) in enumerate(zip(before, tokens, strict=False)) if a != b),
            min(len(before), len(tokens)),
        )
        found.append(len(tokens) - common)
        before = tokens
    return found


def count(requests: Sequence[Request]) -> Count:
    """Count requests that are in order."""
    return Count(
        len(requests),
        sum(len(each.tokens) for each in requests),
        sum(new_tokens(requests)),
        sum(each.max_tokens for each in requests),
        sum(each.cut > 0 for each in requests),
    )


def seconds(requests: Sequence[Request], model: SpeedModel, parallel: int) -> tuple[float, float]:
    """Predict seconds of reading the prompts and, at most, of writing the answers.

    `parallel` requests run side by side: the new tokens of their prompts are one prefill, after the
    tokens that they share with those before; then a token of each is written in every step.
    """

    @cache
    def prefill(tokens: int, before: int) -> float:
        return model.prefill(tokens, before)

    reading = writing = 0.0
    news = new_tokens(requests)
    for start in range(0, len(requests), parallel):
        group = requests[start : start + parallel]
        new = sum(news[start : start + parallel])
        length = max(len(request.tokens) for request in group)
        if new:
            reading += prefill(new, _rounded(max(0, length - new)))
        steps = max(request.max_tokens for request in group)
        if steps:
            writing += steps * prefill(len(group), _rounded(length + steps // 2))
    return reading, writing


def _rounded(tokens: int) -> int:
    """A multiple of 64, so that fewer lengths have to be predicted."""
    return tokens // 64 * 64
