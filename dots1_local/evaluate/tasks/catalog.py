"""Tasks by name: which data sets they need, where these are, and loading them."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dots1_local.errors import Dots1Error, UsageError, readable

__all__ = [
    "DataSet",
    "TaskOptions",
    "Tasks",
    "check_installed",
    "data_sets",
    "load",
    "open_manager",
    "quiet",
]

_PACKAGES = ("aiohttp", "lm_eval", "requests", "tenacity", "prometheus_client", "starlette",
             "uvicorn")  # fmt: skip
_QUIET = {  # read when the libraries are imported
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DISABLE_MULTIPROC": "1",  # the bootstrap would fork a process that runs an engine
}
_LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "httpx")
_SEED = 1234  # lm_eval's default, of its few-shot examples
_TEXTS = "all"  # the task of all texts

Tasks = dict[str, Any]  # lm_eval's TaskDict: tasks, groups and group_map


@dataclass(frozen=True)
class TaskOptions:
    """What is asked: names of tasks, groups or tags, and texts by name.

    `folder` has tasks of one's own. `num_fewshot` replaces the number of examples of tasks that
    have any. Of each task, the first `limit` documents are asked, or all. Questions are put into
    the model's chat template, if that is wanted, after a message of the `system`.
    """

    names: Sequence[str] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    chat_template: bool = False
    system: str | None = None

    def arguments(self) -> dict[str, Any]:
        """What lm_eval's `evaluate` and `build_all_requests` call these."""
        return {
            "system_instruction": self.system,
            "apply_chat_template": self.chat_template,
            "fewshot_as_multiturn": self.chat_template,
        }


@dataclass(frozen=True)
class DataSet:
    """A data set on the hub, with the parts of it (configurations) that tasks need."""

    path: str
    parts: tuple[str, ...]
    cached: int
    """How many of the parts are in the local cache of Hugging Face's datasets."""

    def __str__(self) -> str:
        parts = len(self.parts)
        if self.cached == parts:
            return f"{self.path} is in the local cache"
        missing = f"{parts - self.cached} of its {parts} parts" if parts > 1 else "it"
        return f"{self.path}: {missing} must be fetched from the Hugging Face hub"


def check_installed() -> None:
    """Raise a UsageError if the extra `eval` is not installed."""
    if not all(map(find_spec, _PACKAGES)):
        raise UsageError(
            "dots1 evaluate needs lm-evaluation-harness: pip install 'dots1-local[eval]'"
        )


@contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Keep what lm_eval and the libraries below it print off stdout and, if not `verbose`, away."""
    for name, value in _QUIET.items():
        if not verbose or name == "DISABLE_MULTIPROC":
            os.environ.setdefault(name, value)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(each.level, each.propagate, each.handlers) for each in loggers]
    for each in loggers:
        each.setLevel(logging.INFO if verbose else logging.CRITICAL)
        each.handlers = [logging.StreamHandler()] if verbose else [logging.NullHandler()]
        each.propagate = False
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for each, (level, propagate, handlers) in zip(loggers, before, strict=True):
            each.setLevel(level)
            each.propagate, each.handlers = propagate, handlers


def open_manager(options: TaskOptions) -> Any:
    """Return lm_eval's TaskManager, of the folder alone if it has all tasks.

    Raises:
        UsageError: a name is not known, or the folder is none.
    """
    from lm_eval.tasks import TaskManager

    folder = options.folder
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--task-folder {folder} is not a folder")
    where = str(folder.resolve()) if folder else None
    manager = TaskManager(include_path=where, include_defaults=False)  # all tasks take seconds
    if not set(options.names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=where)
    for name in options.names:
        if name not in manager.task_index:
            close = get_close_matches(name, manager.all_tasks, 3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise UsageError(f"lm_eval has no task {name!r:.80}{hint}")
    for name in options.texts:
        if name in manager.task_index:
            raise UsageError(f"a text and a task are called {name!r}; name the text otherwise")
    return manager


def data_sets(manager: Any, names: Sequence[str]) -> list[DataSet]:
    """Return the data sets on the hub that the tasks need, from the tasks' configurations alone."""
    found: dict[str, dict[str, None]] = {}
    for name in names:
        for config in _configs(manager.task_index, name, set()):
            path = config.get("dataset_path")
            if path and not _is_local(config):
                found.setdefault(str(path), {})[str(config.get("dataset_name") or "default")] = None
    return [
        DataSet(path, tuple(parts), sum(_in_cache(path, part) for part in parts))
        for path, parts in found.items()
    ]


def _configs(index: Mapping[str, Any], name: str, seen: set[str]) -> Iterator[dict[str, Any]]:
    """Yield the configurations of a task, or of all tasks of a group or tag."""
    entry = index.get(name)
    if entry is None or name in seen:
        return
    seen.add(name)
    config = entry.cfg or {}
    members = config.get("task")
    if not isinstance(members, list):
        yield config
        for member in sorted(entry.tags) if entry.yaml_path is None else ():
            yield from _configs(index, member, seen)
        return
    for member in members:
        if isinstance(member, str):
            yield from _configs(index, member, seen)
            continue
        inner = member.get("group") or member.get("task")
        if isinstance(inner, str) and inner in index:
            for each in _configs(index, inner, seen):
                yield {**each, **{key: member[key] for key in member if key not in ("task",)}}
        else:
            yield member


def _is_local(config: Mapping[str, Any]) -> bool:
    """Whether a configuration names files here, or makes its data itself."""
    path, kwargs = str(config["dataset_path"]), config.get("dataset_kwargs") or {}
    files = str(kwargs.get("data_files", "")) if isinstance(kwargs, dict) else ""
    if "://" in files:
        return False
    return bool(files and "/" not in path) or Path(path).exists() or "custom_dataset" in config


def _in_cache(path: str, part: str) -> bool:
    """Whether the datasets library has prepared this part before."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___")
    return any(folder.glob(f"{part}*/*"))


def load(manager: Any, options: TaskOptions) -> Tasks:
    """Load the tasks and their data, from the local cache or from the hub.

    Relative paths of data files begin at the folder of tasks.

    Raises:
        Dots1Error: data cannot be read or fetched, or a task is not valid.
    """
    with chdir(options.folder) if options.folder else nullcontext():
        try:
            tasks: Tasks = manager.load([*options.names, *_text_tasks(options.texts)])
        except Exception as error:  # whatever a task's own code and the libraries raise
            raise Dots1Error(_reason(error)) from error
    for name, task in tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(f"task {name} runs code that the model writes, which is not supported")
        if getattr(task, "MULTIMODAL", False):
            raise UsageError(f"task {name} needs images or sound, which the model cannot read")
        _set_examples(task, options.num_fewshot)
    return tasks


def _reason(error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError

    offline = type(error).__name__ in ("OfflineModeIsEnabled", "LocalEntryNotFoundError")
    offline = offline or isinstance(error, ConnectionError) or "offline" in str(error).lower()
    if offline:
        return (
            "the tasks' data is not in the local cache, and the Hugging Face hub cannot be reached "
            f"({readable(str(error))}); run this once with a network, or name a --task-folder"
        )
    if isinstance(error, DatasetNotFoundError):
        return (
            f"{readable(str(error))}; accept its terms on the hub and set HF_TOKEN if it is gated"
        )
    return f"the tasks cannot be loaded: {type(error).__name__}: {readable(str(error))}"


def _set_examples(task: Any, num_fewshot: int | None) -> None:
    """Choose the number of few-shot examples as lm_eval does; a task's own 0 stays."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=_SEED)


def _text_tasks(texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a task for each text, and one for all of them if there are several."""
    documents = {name: [text] for name, text in texts.items()}
    if len(documents) > 1:
        documents[_TEXTS] = list(texts.values())
    return [_text_task(name, each) for name, each in documents.items()]


def _text_task(name: str, texts: Sequence[str]) -> dict[str, Any]:
    def documents(**_: Any) -> Any:
        from datasets import Dataset

        return {"test": Dataset.from_list([{"text": text} for text in texts])}

    return {
        "task": name,
        "custom_dataset": documents,
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
            for metric, aggregation in (
                ("bits_per_byte", "bits_per_byte"),
                ("word_perplexity", "weighted_perplexity"),
            )
        ],
    }
