"""Models and checkpoints, opened as the options of a verb say."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dots1_local.cli._model import local_model, read_template
from dots1_local.cli._options import exit_on_interrupt
from dots1_local.cli._output import notice, plain, progress_bar, quiet_drivers
from dots1_local.errors import UsageError

if TYPE_CHECKING:
    from dots1_local.engine.engine import Engine
    from dots1_local.files.checkpoint import Checkpoint

__all__ = ["choose_placement", "open_checkpoint", "open_engine", "report_abort"]


def choose_placement(
    model: Path, plan: Path | None, workers: Sequence[str]
) -> Path | Literal["auto"] | None:
    """Return the plan, "auto" if there is a GPU, a worker or a stored plan, or else None."""
    from dots1_local.ggml import gpu_backends
    from dots1_local.placement.placement import stored_placement

    if plan and workers:
        raise UsageError("--plan names the workers it uses; leave out --worker")
    stored = stored_placement(model).exists()
    return plan or ("auto" if workers or stored or gpu_backends() else None)


def open_engine(
    model: Path,
    context: str | None,
    plan: Path | None,
    workers: Sequence[str],
    *,
    raw: bool = False,
    template: Path | None = None,
    **options: Any,
) -> "Engine":
    """Load the model as the options say; a context of "0" is all that it was trained for.

    What is wrong with the file is said once, about its chat template only if not `raw`.
    The file `template` has another template. `options` are those of `Engine.open`.

    Raises:
        UsageError: the context or the plan is not valid.
        Dots1Error: the model cannot be loaded.
    """
    from dots1_local.engine.planned import load
    from dots1_local.sizes import parse_context
    from dots1_local.verify.correct import remaining

    if context is not None:
        options["n_ctx"] = 0 if context.strip() == "0" else parse_context(context)
    if template is not None:
        options["chat_template"] = read_template(template)
    model = local_model(model, outlook=True)
    placement = choose_placement(model, plan, workers)
    with progress_bar("loading") as report:
        engine = load(
            model, placement, workers=tuple(workers), notify=notice, progress=report, **options
        )
    for finding in remaining(engine.gguf):
        advice = "; --chat-template gives the right one" if finding.check == "template" else ""
        if not (raw and advice):
            notice(plain(f"{finding.severity}: {model.name}: {finding.message}{advice}"))
    return engine


def open_checkpoint(path: str, revision: str | None, low_disk: bool) -> "Checkpoint":
    """Open the checkpoint in a folder, or that of a model on the hub.

    Raises:
        CheckpointError: it is neither, or is incomplete, corrupt, or of another architecture.
        UsageError: the extra `hub` is missing, or an option for the hub is given with a folder.
    """
    from dots1_local.hub import on_hub
    from dots1_local.hub import open_checkpoint as open_

    with exit_on_interrupt("stopped"):
        checkpoint = open_(path, revision)
    on_hub(checkpoint, low_disk)
    return checkpoint


@contextmanager
def report_abort() -> Iterator[None]:
    """Print a sentence if the engine ends the process or makes it wait, and nothing of drivers."""
    from dots1_local.engine.abort import on_abort

    with quiet_drivers(), on_abort(_report, _report):
        yield


def _report(sentence: str) -> None:
    below = "\n" * sys.stdout.isatty()  # an unfinished answer
    notice(f"{below}dots1: {sentence}")
