"""Running by a plan: options that verbs share, and what is told of it and of an engine's end."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dots1_local.cli._output import notice, progress_bar
from dots1_local.errors import UsageError

if TYPE_CHECKING:
    from dots1_local.engine.engine import Engine

__all__ = [
    "Context",
    "Plan",
    "Ram",
    "Vram",
    "Workers",
    "chosen_placement",
    "limits",
    "one_sentence",
    "open_engine",
]

Context = Annotated[
    str | None,
    typer.Option(
        "--context",
        "-c",
        help="Tokens that a conversation or request may have, such as 8k; 16k by default; 0 is all "
        "that the model was trained for.",
    ),
]
Plan = Annotated[
    Path | None, typer.Option("--plan", help="Run it as a file of dots1 plan --json says.")
]
Workers = Annotated[
    list[str] | None,
    typer.Option("--worker", help="HOST:PORT of a dots1 worker to use; may be repeated."),
]

Vram = Annotated[
    str | None, typer.Option("--vram", help="Plan with so much of each GPU, such as 20GB.")
]
Ram = Annotated[str | None, typer.Option("--ram", help="Plan with so much RAM, such as 60GB.")]


def limits(vram: str | None, ram: str | None) -> dict[str, int | None]:
    """For `limited`: the bytes to plan with, which may be 0, of a GPU that is to be left alone.

    Raises:
        UsageError: one of them is no size.
    """
    from dots1_local.sizes import parse_size

    def nbytes(size: str | None) -> int | None:
        if size is None or size.strip() == "0":
            return None if size is None else 0
        return parse_size(size)

    return {"vram": nbytes(vram), "ram": nbytes(ram)}


def chosen_placement(plan: Path | None, workers: Sequence[str]) -> Path | Literal["auto"] | None:
    """For `load`: the plan; one to be made where there is a device beside the CPU; else none.

    Raises:
        UsageError: a plan, and workers besides.
    """
    from dots1_local.ggml import gpu_backends

    if plan and workers:
        raise UsageError("--plan names the workers it uses; leave out --worker")
    return plan or ("auto" if workers or gpu_backends() else None)


def open_engine(
    model: Path, context: str | None, plan: Path | None, workers: Sequence[str], **options: Any
) -> "Engine":
    """The engine that options ask for, run by a plan where there is a choice.

    A `context` of "0" is all that the model was trained for; `options` are those of `Engine.open`.

    Raises:
        UsageError: no context or plan as it should be.
        Dots1Error: whatever keeps the model from being loaded.
    """
    from dots1_local.engine.planned import load
    from dots1_local.placement.memory import parse_context

    if context is not None:
        options["n_ctx"] = 0 if context.strip() == "0" else parse_context(context)
    placement = chosen_placement(plan, workers)
    with progress_bar("loading") as report:
        return load(
            model, placement, workers=tuple(workers), tell=notice, progress=report, **options
        )


@contextmanager
def one_sentence() -> Iterator[None]:
    """Should the engine end the process within, say why in one sentence."""
    from dots1_local.engine.abort import handling

    with handling(lambda reason: notice(f"dots1: {reason}")):
        yield
