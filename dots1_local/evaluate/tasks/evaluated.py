"""A model that is to be evaluated: its context, its answers, and what is ahead of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import Hardware
from dots1_local.engine.engine import Engine, Vocabulary, open_loadable
from dots1_local.errors import Dots1Error
from dots1_local.evaluate.tasks.answers import AnswerFile, answers_path
from dots1_local.evaluate.tasks.catalog import TaskOptions, Tasks
from dots1_local.evaluate.tasks.estimate import (
    Count,
    Estimate,
    count,
    estimate,
    in_order,
    seconds,
)
from dots1_local.files.gguf import GGUFFile
from dots1_local.files.user_folder import user_folder
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import (
    Placement,
    check_context,
    check_made_for,
    default_context,
)
from dots1_local.placement.planner import place
from dots1_local.placement.speed_model import SpeedModel, is_measured
from dots1_local.progress import Progress, silent
from dots1_local.sizes import parse_context

__all__ = ["EvaluatedModel", "Outlook"]

_PARALLEL = 4


@dataclass(frozen=True)
class Outlook:
    """What a model is asked: all requests, and those that are not answered yet.

    `seconds` are predicted: of reading prompts, and at most of writing answers. They are None if
    the machine's speeds are not known.
    """

    model: "EvaluatedModel"
    estimate: Estimate
    total: Count
    remaining: Count
    seconds: tuple[float, float] | None


@dataclass(frozen=True)
class EvaluatedModel:
    """A file, and how it is run: `parallel` requests of `n_ctx` tokens at once."""

    path: Path
    n_ctx: int
    parallel: int
    gguf: GGUFFile = field(repr=False)
    placement: Placement | Literal["auto"] | None
    threads: int | None
    folder: Path

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        placement: Placement | Literal["auto"] | None = None,
        context: str | None = None,
        parallel: int | None = None,
        threads: int | None = None,
        folder: Path | None = None,
    ) -> Self:
        """Read a file's header; a `context` of "0" is all that the model was trained for.

        By default, four requests run at once, or as many as a placement is for. Answers are kept
        in `folder`, by default in the user's cache.

        Raises:
            GGUFError: the file is unreadable, or something in it is wrong.
            UsageError: the context is not valid, or the placement is for another file.
        """
        gguf = open_loadable(path)
        plan = placement if isinstance(placement, Placement) else None
        if plan:
            check_made_for(plan, gguf)
        parallel = parallel or (plan.sequences if plan else _PARALLEL)
        trained = Dots1Config.from_gguf(gguf.keys, path).max_position_embeddings
        if context is not None:
            n_ctx = trained if context.strip() == "0" else parse_context(context)
        elif plan:
            n_ctx = min(plan.context, plan.tokens // parallel)
        else:
            n_ctx = default_context(trained, parallel)
        check_context(n_ctx, parallel)
        return cls(path, n_ctx, parallel, gguf, placement, threads, folder or _default_folder())

    def estimate(self, tasks: Tasks, options: TaskOptions, progress: Progress = silent) -> Estimate:
        """Make all requests with the file's tokeniser, and count them."""
        with Vocabulary.load(self.path) as vocabulary:
            return estimate(vocabulary, self.n_ctx, tasks, options, progress)

    def answers(self, engine: Engine | None = None) -> AnswerFile:
        """Open the answers that an engine gave before, or that one would give by the placement."""
        settings: tuple[Any, ...] = "F16", True if self.placement == "auto" else None
        if isinstance(self.placement, Placement):
            settings = self.placement.kv_type, self.placement.flash_attention
        if engine is not None:
            settings = engine.params.kv_type.upper(), engine.params.flash_attention
        return AnswerFile(answers_path(self.folder, self.gguf, settings))

    def outlook(self, estimate: Estimate, machine: Hardware) -> Outlook:
        """Count what remains, and predict how long that takes on a machine."""
        with self.answers() as answers:
            missing = estimate.missing(answers)
        model = self._speed(machine)
        times = None if model is None else seconds(missing, model, self.parallel)
        total = count(in_order(estimate.requests.values()))
        return Outlook(self, estimate, total, count(missing), times)

    def _speed(self, machine: Hardware) -> SpeedModel | None:
        if not is_measured(machine, ()):
            return None
        placement = self.placement
        if not isinstance(placement, Placement):
            placement = place(
                self.gguf,
                machine,
                context=self.n_ctx,
                sequences=self.parallel,
                threads=self.threads,
            )
        if not is_measured(machine, placement.used_devices):
            return None
        return SpeedModel(ModelGraph.read(self.gguf), machine, placement)


def _default_folder() -> Path:
    try:
        return user_folder("cache") / "answers"
    except RuntimeError:
        raise Dots1Error(
            "there is no home folder to keep answers in; name one with --answers"
        ) from None
