"""What `dots1 evaluate` prints: what is ahead, and scores beside a reference's."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dots1_local.cli._output import one_line, plural, print_table

if TYPE_CHECKING:
    from dots1_local.evaluate.tasks.catalog import DataSet, TaskOptions, Tasks
    from dots1_local.evaluate.tasks.estimate import Count
    from dots1_local.evaluate.tasks.evaluated import Outlook
    from dots1_local.evaluate.tasks.scores import Comparison

__all__ = ["describe", "outlook_json", "print_outlooks", "print_scores", "scores_json"]


def describe(outlook: "Outlook") -> str:
    """Say in a sentence what a model will be asked, and how long that takes."""
    total, remaining, model = outlook.total, outlook.remaining, outlook.model
    parts = [f"{model.path.name}: {plural(total.requests, 'request')}"]
    if remaining.requests < total.requests:
        parts.append(f"of which {total.requests - remaining.requests:,} are answered")
    parts.append(f"{remaining.computed:,} tokens to read")
    if remaining.answer_tokens:
        parts.append(f"at most {remaining.answer_tokens:,} to write")
    sentence = ", ".join(parts)
    if remaining.cut:
        sentence += (
            f"; {plural(remaining.cut, 'prompt')} will lose the beginning, because the context is "
            f"{model.n_ctx:,} tokens"
        )
    if outlook.seconds is None:
        return f"{sentence}; dots1 hardware measures what a prediction of the time needs"
    if not remaining.requests:
        return sentence
    reading, writing = outlook.seconds
    at_most = "at most " if writing else "about "
    return f"{sentence}; {at_most}{_duration(reading + writing)} by the prediction"


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def print_outlooks(outlooks: "Sequence[Outlook]") -> None:
    """Print what each task and all together ask, by model."""
    header = (
        "model", "task", "requests", "prompt tokens", "computed", "written at most", "reading",
        "writing at most",
    )  # fmt: skip
    rows: list[Sequence[str]] = []
    for each in outlooks:
        name = each.model.path.name
        for task, count in each.estimate.by_task.items():
            rows.append((name, one_line(task), *_cells(count), "", ""))
        times = ["-", "-"] if each.seconds is None else map(_duration, each.seconds)
        rows.append((name, "all tasks", *_cells(each.total), "", ""))
        rows.append((name, "remaining", *_cells(each.remaining), *times))
    print_table(header, rows, numbers_from=2)


def _cells(count: "Count") -> tuple[str, ...]:
    numbers = (count.requests, count.prompt_tokens, count.computed, count.answer_tokens)
    return tuple(f"{each:,}" for each in numbers)


def outlook_json(needed: "Sequence[DataSet]", outlooks: "Sequence[Outlook]") -> dict[str, Any]:
    """Return what a dry run found, for scripts."""
    models = [
        {
            "file": str(each.model.path),
            "context": each.model.n_ctx,
            "parallel": each.model.parallel,
            "tasks": {name: asdict(count) for name, count in each.estimate.by_task.items()},
            "total": asdict(each.total),
            "remaining": asdict(each.remaining),
            "seconds": each.seconds
            and dict(zip(("reading", "writing_at_most"), each.seconds, strict=True)),
        }
        for each in outlooks
    ]
    return {"data_sets": [asdict(each) for each in needed], "models": models}


def print_scores(runs: Sequence[Mapping[str, Any]], tasks: "Tasks") -> None:
    """Print the scores of the first run, compared with those of a second one."""
    from dots1_local.evaluate.tasks.scores import compare, scores

    found = scores(runs[0])
    filters = any(each.filter != "none" for each in found)
    header = ["task", "metric", *(["filter"] if filters else []), "shots", "documents", "score",
              "+/-"]  # fmt: skip
    header += ["reference", "% of it", "+/-"] if len(runs) > 1 else []
    rows = []
    for each in found:
        cells = ["  " * each.depth + one_line(each.name), one_line(each.metric)]
        cells += [one_line(each.filter)] if filters else []
        shots = "" if each.num_fewshot is None else str(each.num_fewshot)
        cells += [shots, f"{each.samples:,}", _number(each.value, 4), _number(each.error, 4)]
        if len(runs) > 1:
            other = compare(each, runs[0], runs[1], tasks)
            cells += _compared(other)
        rows.append(cells)
    print_table(header, rows, numbers_from=3 if filters else 2)


def _compared(other: "Comparison | None") -> list[str]:
    if other is None:
        return ["-", "-", "-"]
    return [_number(other.reference, 4), _number(other.percent, 2), _number(other.error, 2)]


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.{digits}e}"


def scores_json(
    paths: Sequence[Path], runs: Sequence[Mapping[str, Any]], tasks: "Tasks", options: "TaskOptions"
) -> dict[str, Any]:
    """Return all scores, for scripts."""
    from dots1_local.evaluate.tasks.scores import compare, scores

    found = []
    for each in scores(runs[0]):
        entry = asdict(each)
        del entry["depth"]
        if len(runs) > 1:
            other = compare(each, runs[0], runs[1], tasks)
            entry["reference"] = other and asdict(other)
        found.append(entry)
    return {
        "lm_eval": version("lm_eval"),
        "model": str(paths[0]),
        "reference": str(paths[1]) if len(paths) > 1 else None,
        "limit": options.limit,
        "num_fewshot": options.num_fewshot,
        "chat_template": options.chat_template,
        "system": options.system,
        "scores": found,
    }
