"""`dots1 evaluate`: scores of lm-evaluation-harness's tasks, and of texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dots1_local.cli import _options as shared
from dots1_local.cli._evaluate_report import (
    describe,
    outlook_json,
    print_outlooks,
    print_scores,
    scores_json,
)
from dots1_local.cli._model import local_model
from dots1_local.cli._open import choose_placement, open_engine, report_abort
from dots1_local.cli._options import flag, option, verb
from dots1_local.cli._output import is_verbose, notice, print_json, progress_bar
from dots1_local.errors import UsageError

if TYPE_CHECKING:
    from dots1_local.devices.hardware import Hardware
    from dots1_local.evaluate.tasks.catalog import TaskOptions, Tasks
    from dots1_local.evaluate.tasks.evaluated import EvaluatedModel, Outlook

__all__ = ["EvaluateOptions", "evaluate"]

_SCORED = 64  # prompt tokens whose log-probabilities are computed at once, as in dots1 serve


@dataclass(frozen=True, eq=False, repr=False)
class EvaluateOptions:
    model: shared.Model
    tasks: list[str] | None = option(
        "Ask these tasks, groups or tags of lm_eval, separated by commas; repeatable."
    )
    text: list[str] | None = option(
        "Score this text, UTF-8, as a whole; repeatable, by name and all together.",
        metavar="[NAME=]FILE",
    )
    reference: Path | None = option(
        "Evaluate this model afterwards, and give scores in percent of its scores.",
        metavar="OTHER.gguf",
    )
    dry_run: bool = flag(
        "Only count requests and tokens, and predict how long they take.", "--dry-run"
    )
    hardware: str | None = option(
        "With --dry-run: predict for the machine in this file, or for one of those that "
        "dots1 hardware lists.",
        default="this machine",
    )
    task_folder: Path | None = option(
        "Find tasks in this folder too: lm_eval's YAML files, with their data beside them. The "
        "Python functions that a task names are run.",
        metavar="DIR",
    )
    limit: int | None = option(
        "Ask only the first documents of each task.", "--limit", "-l", min=1, default="all"
    )
    num_fewshot: int | None = option(
        "Show this many examples before a question, unless a task is made for none.",
        min=0,
        default="what each task says",
    )
    chat_template: bool = flag("Put questions into the model's chat template.", "--chat-template")
    system: str | None = option("Begin with this system message.", metavar="TEXT")
    parallel: int | None = option(
        "Ask this many requests at once.", min=1, max=255, default="the plan's, or 4"
    )
    answers: Path | None = option(
        "Keep answers in this folder, from which an interrupted run goes on.",
        metavar="DIR",
        default="a folder of the user's cache",
    )
    context: shared.Context = None
    plan: shared.Plan = None
    worker: shared.Workers = None
    threads: shared.Threads = None
    json: shared.Json = False


@verb
def evaluate(options: EvaluateOptions) -> None:
    """Score tasks of lm-evaluation-harness, with standard errors. Interrupted runs go on.

    dots1 evaluate dots1-DQ4.gguf --tasks mmlu,gpqa_diamond_n_shot --dry-run

    dots1 evaluate dots1-DQ4.gguf --tasks mmlu --reference dots1-Q8_0.gguf

    dots1 evaluate dots1-DQ4.gguf --text english=eng.txt --text chinese=zh.txt
    """
    from dots1_local.evaluate.tasks.catalog import (
        TaskOptions,
        check_installed,
        data_sets,
        load,
        open_manager,
        quiet,
    )

    names = [name.strip() for each in options.tasks or () for name in each.split(",")]
    _check(options, names)
    check_installed()
    asked = TaskOptions(
        names=list(dict.fromkeys(filter(None, names))),
        texts=_texts(options),
        folder=options.task_folder,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        chat_template=options.chat_template,
        system=options.system,
    )
    options = replace(
        options,
        model=local_model(options.model, outlook=True),
        reference=options.reference and local_model(options.reference, outlook=True),
    )
    paths = [options.model, *([options.reference] if options.reference else [])]
    stopped = "stopped; the same command goes on from here" if not options.dry_run else "stopped"
    with shared.exit_on_interrupt(stopped), report_abort(), quiet(is_verbose()):
        models = [_open(options, path) for path in paths]
        manager = open_manager(asked)
        needed = data_sets(manager, asked.names)
        for data_set in needed:
            notice(str(data_set))
        tasks = load(manager, asked)
        outlooks = [_look_ahead(options, model, tasks, asked) for model in models]
        for outlook in outlooks:
            notice(describe(outlook))
        runs = [
            _evaluate(options, model, outlook, tasks, asked)
            for model, outlook in zip(models, outlooks, strict=True)
            if not options.dry_run
        ]
    if options.dry_run and options.json:
        print_json(outlook_json(needed, outlooks))
    elif options.dry_run:
        print_outlooks(outlooks)
    elif options.json:
        print_json(scores_json(paths, runs, tasks, asked))
    else:
        print_scores(runs, tasks)


def _check(options: EvaluateOptions, names: Sequence[str]) -> None:
    """Refuse options that contradict each other."""
    if not any(names) and not options.text:
        raise typer.BadParameter("name tasks of lm_eval, or a --text", param_hint="--tasks")
    if options.hardware is not None and not options.dry_run:
        raise typer.BadParameter("--hardware goes with --dry-run")


def _texts(options: EvaluateOptions) -> dict[str, str]:
    from dots1_local.evaluate.perplexity import read_text

    files = shared.named_files(options.text or (), "--text")
    texts = {name: read_text(path) for name, path in files.items()}
    for name, text in texts.items():
        if not text.strip():
            raise UsageError(f"{files[name]} has no text to score")
    return texts


def _open(options: EvaluateOptions, path: Path) -> "EvaluatedModel":
    """Read the header of a model; a plan is for the first one."""
    from dots1_local.evaluate.tasks.evaluated import EvaluatedModel
    from dots1_local.placement.placement import load_placement

    plan = options.plan if path == options.model else None
    chosen = choose_placement(path, plan, options.worker or ())
    return EvaluatedModel.open(
        path,
        placement=load_placement(chosen) if isinstance(chosen, Path) else chosen,
        context=options.context,
        parallel=options.parallel,
        threads=options.threads,
        folder=options.answers,
    )


def _look_ahead(
    options: EvaluateOptions, model: "EvaluatedModel", tasks: "Tasks", asked: "TaskOptions"
) -> "Outlook":
    with progress_bar(f"counting the tokens of {model.path.name}") as report:
        estimate = model.estimate(tasks, asked, report)
    return model.outlook(estimate, _machine(options))


def _machine(options: EvaluateOptions) -> "Hardware":
    """Return the machine to predict for; a dry run measures this one if that was never done."""
    from dots1_local.devices.machine import find_hardware, this_machine

    if options.hardware is not None:
        return find_hardware(options.hardware)
    workers = tuple(options.worker or ())
    if not options.dry_run:
        return this_machine(workers, measure="cached")
    with progress_bar("looking at this machine") as report:
        return this_machine(workers, progress=report)


def _evaluate(
    options: EvaluateOptions,
    model: "EvaluatedModel",
    outlook: "Outlook",
    tasks: "Tasks",
    asked: "TaskOptions",
) -> dict[str, Any]:
    """Load a model, ask what is not answered yet, and free the model."""
    from dots1_local.evaluate.tasks.run import evaluate as run

    with (
        open_engine(
            model.path,
            str(model.n_ctx),
            options.plan if model.path == options.model else None,
            options.worker or (),
            shared_cache=True,
            threads=options.threads,
            n_sequences=model.parallel,
            n_scored=_SCORED,
        ) as engine,
        model.answers(engine) as answers,
        progress_bar(f"evaluating {model.path.name}") as report,
    ):
        return run(engine, tasks, asked, answers, outlook.estimate, report)
