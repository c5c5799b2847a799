"""Scores of tasks and groups, and how they compare with those of a reference model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import numpy as np

from dots1_local.evaluate.tasks.catalog import Tasks

__all__ = ["Comparison", "Score", "compare", "scores"]


@dataclass(frozen=True)
class Score:
    """A metric of a task or a group, and its standard error if there is one.

    `depth` is how many groups are around it. `filter` is what took the answer from the text.
    """

    name: str
    depth: int
    metric: str
    filter: str
    value: float
    error: float | None
    samples: int
    num_fewshot: int | None


@dataclass(frozen=True)
class Comparison:
    """A score in percent of the reference's, with the standard error of the paired difference."""

    reference: float
    percent: float | None
    error: float | None


def scores(results: Mapping[str, Any]) -> list[Score]:
    """All numbers that lm_eval reports, each group before its members."""
    found = []
    for name, depth in _tree(results):
        metrics = results["results"].get(name, {})
        for key, value in metrics.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            error = metrics.get(f"{metric}_stderr,{filter_name}")
            found.append(
                Score(
                    name,
                    depth,
                    metric,
                    filter_name,
                    float(value),
                    float(error) if _is_number(error) else None,
                    int(metrics.get("sample_len", 0)),
                    results["n-shot"].get(name),
                )
            )
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and isfinite(value)


def _tree(results: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the names of groups and tasks with their depth."""
    members = results.get("group_subtasks", {})
    inner = {child for children in members.values() for child in children}

    def walk(name: str, depth: int) -> Iterator[tuple[str, int]]:
        yield name, depth
        for child in members.get(name, ()):
            yield from walk(child, depth + 1)

    for name in dict.fromkeys((*members, *results["results"])):
        if name not in inner:
            yield from walk(name, 0)


def compare(
    score: Score, results: Mapping[str, Any], reference: Mapping[str, Any], tasks: Tasks
) -> Comparison | None:
    """Compare a score with that of the reference model on the same documents.

    Both models answer the same questions, so the error is that of the mean of the differences
    d = a - b of each document: sqrt(var(d) / n) with n - 1 in the variance (Miller, "Adding Error
    Bars to Evals", arXiv:2411.00640, section 4.2), divided by the reference's score. The error of a
    group combines those of its tasks, which are independent samples, with the weights w of its
    mean: sqrt(sum of (w e)²). It is None where a score is no mean over documents. Returns None if
    the reference has no such score.
    """
    key = f"{score.metric},{score.filter}"
    value = reference["results"].get(score.name, {}).get(key)
    if not _is_number(value):
        return None
    error = _paired_error(score, results, reference, tasks)
    if not value:
        return Comparison(float(value), None, None)
    scale = 100 / float(value)
    return Comparison(
        float(value), scale * score.value, None if error is None else abs(scale) * error
    )


def _paired_error(
    score: Score, results: Mapping[str, Any], reference: Mapping[str, Any], tasks: Tasks
) -> float | None:
    if score.name in tasks["tasks"]:
        found = _differences(score, score.name, results, reference, tasks)
        return None if found is None else _error(found)
    group = tasks["groups"][score.name]
    by_size = {each.metric: each.weight_by_size for each in group.aggregate_metric_list or ()}
    members = [
        _differences(score, task.task_name, results, reference, tasks)
        for task in group.get_all_tasks()
        if f"{score.metric},{score.filter}" in results["results"].get(task.task_name, {})
    ]
    errors, sizes = [], []
    for each in members:
        error = None if each is None else _error(each)
        if each is None or error is None:
            return None
        errors.append(error)
        sizes.append(len(each) if by_size.get(score.metric, True) else 1)
    weights = np.array(sizes) / sum(sizes)
    return sqrt(float(((weights * errors) ** 2).sum()))


def _differences(
    score: Score, name: str, results: Mapping[str, Any], reference: Mapping[str, Any], tasks: Tasks
) -> Sequence[float] | None:
    """The differences of a task's documents; None if its score is not their mean."""
    from lm_eval.api.metrics import mean

    if tasks["tasks"][name].aggregation().get(score.metric, mean) is not mean:
        return None
    ours, theirs = (
        {
            sample["doc_id"]: sample[score.metric]
            for sample in run["samples"][name]
            if sample["filter"] == score.filter and score.metric in sample
        }
        for run in (results, reference)
    )
    if ours.keys() != theirs.keys() or not all(map(_is_number, (*ours.values(), *theirs.values()))):
        return None
    return [float(value) - float(theirs[document]) for document, value in ours.items()]


def _error(differences: Sequence[float]) -> float | None:
    """The standard error of the mean; None for fewer than two."""
    if len(differences) < 2:
        return None
    return float(np.std(differences, ddof=1)) / sqrt(len(differences))
