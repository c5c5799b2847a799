"""The model that a verb is given: a file here, or ORG/NAME[:TYPE] on the Hugging Face hub.

Where no type is named, or an unknown one, a table says what each type would do on a machine.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dots1_local.cli._options import exit_on_interrupt
from dots1_local.cli._output import notice, plain, plural, print_json, print_table, progress_bar
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from dots1_local.devices.hardware import Hardware
    from dots1_local.files.gguf import GGUFFile
    from dots1_local.hub.ready_made import HubModel, HubModels

__all__ = ["find_model", "list_types", "local_model", "read_model", "read_template"]

_AT_ONCE = 4  # headers


def local_model(model: Path, *, outlook: bool = False) -> Path:
    """Return the path of a model's file; a model on the hub is fetched into the hub's cache.

    With `outlook`, say before a download what the model would do on this machine.

    Raises:
        UsageError: the model has several types, or not the named one.
        Dots1Error: the hub has no such model, or it cannot be fetched.
    """
    found = find_model(model)
    if found is None:
        return model
    if outlook and not found.is_cached:
        notice(plain(_outlook(found)))
    with (
        exit_on_interrupt("stopped; what has arrived is kept"),
        progress_bar(str(found)) as progress,
    ):
        return found.fetch(progress)


def _outlook(model: "HubModel") -> str:
    from dots1_local.devices.machine import this_machine

    row = _predict_one(model, this_machine((), measure="cached"), None)
    does = row.error or row.lacks or "it fits this machine"
    speed = f", about {row.speeds[0]:.1f} tok/s" if row.speeds and not row.lacks else ""
    return f"{model} has {human_bytes(model.nbytes)} to fetch: {does}{speed}"


def read_model(model: Path) -> "GGUFFile":
    """Read a model's header; of a model on the hub, a few MB are fetched.

    Raises:
        Dots1Error: as `local_model`; the header is damaged.
    """
    from dots1_local.files.gguf import GGUFFile

    found = find_model(model)
    return GGUFFile.open(model) if found is None else found.header()


def find_model(model: Path) -> "HubModel | None":
    """Find a model on the hub; None if the text names a file.

    Raises:
        Dots1Error: as `local_model`.
    """
    reference = _reference(model)
    if reference is None:
        return None
    name, wanted = reference
    models = _find_models(name, model)
    if chosen := models.choose(wanted):
        return chosen
    best = _show_on_stderr(models)
    problem = f"has no type {wanted}" if wanted else f"has {plural(len(models.models), 'type')}"
    raise UsageError(f"{name} {problem}; name one of them, such as {best}")


def read_template(path: Path) -> str:
    """Read a chat template from a file.

    Raises:
        UsageError: the file cannot be read.
        GGUFError: the template does not parse.
    """
    from dots1_local.files.chat_template import ChatTemplate

    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the chat template {path}: {error}") from None
    ChatTemplate(source, str(path))  # refuses a bad one before a long load
    return source


def list_types(
    model: Path, machine: "Callable[[], Hardware]", context: int | None, json: bool
) -> bool:
    """Print the types of ORG/NAME if there are several; return whether they were printed."""
    reference = _reference(model)
    if reference is None or reference[1] is not None:
        return False
    models = _find_models(reference[0], model)
    if models.choose(None):
        return False
    rows = _predict(models, machine(), context)
    if json:
        print_json([row.to_json() for row in rows])
    else:
        _print(rows)
    return True


def _reference(model: Path) -> tuple[str, str | None] | None:
    """Return the repository and the type that a text names; None for a file."""
    if os.path.lexists(model):
        return None
    from dots1_local.hub.ready_made import parse_reference  # imports numpy

    return parse_reference(str(model))


def _find_models(name: str, model: Path) -> "HubModels":
    from dots1_local.hub.ready_made import find_models

    try:
        models = find_models(name)
    except Dots1Error as error:
        raise type(error)(f"there is no file {model}, and {error}") from error
    for note in models.notes:
        notice(note)
    return models


@dataclass(frozen=True)
class _Row:
    """What one model would do on a machine.

    `lacks` is None if the model fits. `speeds` are tokens a second with an empty and a full
    context; there are none if the machine has not been measured.
    """

    model: "HubModel"
    lacks: str | None = None
    speeds: tuple[float, ...] = ()
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "type": self.model.type,
            "files": [file.name for file in self.model.files],
            "bytes": self.model.nbytes,
            "fits": None if self.error else self.lacks is None,
            "shortfall": self.lacks,
            "decode": list(self.speeds),
            "error": self.error,
        }


def _show_on_stderr(models: "HubModels") -> "HubModel":
    """Print what each type would do on this machine; return the largest that fits, or the first."""
    from dots1_local.devices.machine import this_machine

    rows = _predict(models, this_machine((), measure="cached"), None)
    with redirect_stdout(sys.stderr):
        _print(rows)
    fitting = [row.model for row in rows if row.lacks is None and not row.error]
    return (fitting or [row.model for row in rows])[-1 if fitting else 0]


def _predict(models: "HubModels", machine: "Hardware", context: int | None) -> "list[_Row]":
    from dots1_local.hub.client import parallel_map

    count, done = len(models.models), 0
    with exit_on_interrupt("stopped"), progress_bar("reading headers") as progress:

        def predict(model: "HubModel", _: object) -> _Row:
            nonlocal done
            row = _predict_one(model, machine, context)
            done += 1
            return row

        return parallel_map(
            predict, models.models, _AT_ONCE, lambda: progress(done, count, "types", models.name)
        )


def _predict_one(model: "HubModel", machine: "Hardware", context: int | None) -> _Row:
    from dots1_local.placement.alternatives import explain_shortfall
    from dots1_local.placement.model_graph import ModelGraph
    from dots1_local.placement.planner import place
    from dots1_local.placement.speed_model import forecast
    from dots1_local.verify.correct import corrected

    try:
        gguf = corrected(model.header())
        graph = ModelGraph.read(gguf)
        placement = place(gguf, machine, context=context)
        lacks = explain_shortfall(graph, machine, placement)
        speeds = forecast(graph, machine, placement).speeds
    except Dots1Error as error:
        return _Row(model, error=str(error))
    ends = tuple(at.decode for at in (*speeds[:1], *speeds[-1:]))
    return _Row(model, str(lacks) if lacks else None, ends)


def _print(rows: Sequence[_Row]) -> None:
    def cells() -> Iterator[tuple[str, ...]]:
        for row in rows:
            fits = "?" if row.error else "no" if row.lacks else "yes"
            speeds = [f"{speed:.2f}" for speed in row.speeds] or ["-", "-"]
            count = str(len(row.model.files))
            yield row.model.type, fits, human_bytes(row.model.nbytes), count, *speeds

    header = ("type", "fits", "size", "files", "tok/s", "with a full context")
    print_table(header, cells(), numbers_from=2)
    for row in rows:
        if row.error:
            notice(plain(f"{row.model.type}: {row.error}"))
    if not any(row.speeds for row in rows):
        notice("speeds are not predicted: run dots1 hardware once to measure this machine")
