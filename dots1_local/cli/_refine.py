"""The refinement of `dots1 convert`: its options checked, its calibration, and its table."""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

from dots1_local.cli._options import exit_on_interrupt
from dots1_local.cli._output import notice, notice_resumed, print_table, progress_bar
from dots1_local.errors import Dots1Error, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dots1_local.calibrate.calibrate import Precision
    from dots1_local.convert import Conversion, Result
    from dots1_local.convert.refined_results import PartResult
    from dots1_local.files.checkpoint import Checkpoint

    Tokens = NDArray[np.int32]

__all__ = ["RefineOptions", "check_refinement", "measured_folder", "refined_json", "show_refined",
           "token_warnings"]  # fmt: skip

_N_CTX = 512  # tokens of a chunk, as in dots1 calibrate


class RefineOptions(Protocol):
    """The options of `dots1 convert` that refinement reads."""

    @property
    def output(self) -> Path | None: ...
    @property
    def calibration(self) -> str | None: ...
    @property
    def refine(self) -> bool: ...
    @property
    def file(self) -> list[Path] | None: ...
    @property
    def chat(self) -> list[Path] | None: ...
    @property
    def device(self) -> str | None: ...
    @property
    def precision(self) -> "Precision": ...
    @property
    def threads(self) -> int | None: ...
    @property
    def low_disk(self) -> bool: ...
    @property
    def dry_run(self) -> bool: ...


def check_refinement(options: RefineOptions) -> None:
    """Refuse options that contradict each other, and a missing extra."""
    has_text = bool(options.file or options.chat)
    if has_text and not options.refine:
        raise typer.BadParameter("-f and --chat go with --refine")
    if has_text and options.calibration is not None:
        raise typer.BadParameter("--calibration has its own text; leave -f and --chat out")
    if not options.refine:
        return
    if not has_text and options.calibration is None:
        raise typer.BadParameter(
            "name a text with -f, or the folder of dots1 calibrate --refine with --calibration",
            param_hint="--refine",
        )
    if has_text and options.dry_run:
        raise typer.BadParameter("with --refine it needs --calibration", param_hint="--dry-run")
    if importlib.util.find_spec("torch") is None:
        raise UsageError("--refine computes with PyTorch: pip install 'dots1-local[torch]'")


def measured_folder(checkpoint: "Checkpoint", options: RefineOptions) -> Path | None:
    """Return the folder of the calibration, in the hub's cache if --calibration names an id there.

    With a text, calibrate into OUTPUT.calibration first, unless that was done with the same text.

    Raises:
        UsageError: the text is too short.
        Dots1Error: the folder was made from another text, or the calibration fails.
    """
    if options.calibration is not None:
        from dots1_local.calibrate.manifest import find_calibration

        with exit_on_interrupt("stopped"), progress_bar("calibration") as progress:
            return find_calibration(
                options.calibration, checkpoint, refine=options.refine, progress=progress
            )
    if options.output is None or not (options.file or options.chat):
        return None
    import numpy as np

    from dots1_local.calibrate.manifest import REFINEMENT
    from dots1_local.calibrate.refinement_file import RefinementData
    from dots1_local.evaluate.texts import open_vocabulary, tokenize
    from dots1_local.refine.token_needs import require_tokens

    folder = options.output.with_name(f"{options.output.name}.calibration")
    files, chats = options.file or [], options.chat or []
    with open_vocabulary(checkpoint) as vocabulary:
        tokens = tokenize(checkpoint, vocabulary, _N_CTX, files, chats, None)
    require_tokens(checkpoint.config, tokens.size)
    if not (folder / REFINEMENT).exists():
        _calibrate(checkpoint, folder, tokens, options)
    elif not np.array_equal(RefinementData.load(folder, checkpoint).tokens, tokens):
        raise Dots1Error(
            f"{folder} was calibrated with another text; remove it, or use it with "
            f"--calibration {folder}"
        )
    return folder


def _calibrate(
    checkpoint: "Checkpoint", folder: Path, tokens: "Tokens", options: RefineOptions
) -> None:
    from dots1_local.calibrate.calibrate import calibrate
    from dots1_local.evaluate.texts import dataset_names

    with (
        exit_on_interrupt("stopped; run the same command again to resume after the last layer"),
        progress_bar("calibration") as progress,
    ):
        calibrate(
            checkpoint,
            folder,
            tokens,
            refine=True,
            datasets=dataset_names(options.file or [], options.chat or []),
            device=options.device,
            precision=options.precision,
            threads=options.threads,
            low_disk=options.low_disk,
            progress=progress,
            on_resume=notice_resumed,
            notify=notice,
        )
    notice(f"wrote {folder} from {tokens.size:,} tokens; other sizes can use it: --calibration")


def token_warnings(conversion: "Conversion") -> Iterator[str]:
    """Warn of a text that is short for refinement."""
    from dots1_local.refine.token_needs import advice

    if conversion.refinement is not None:
        config = conversion.checkpoint.config
        if sentence := advice(config, conversion.refinement.tokens.size):
            yield sentence


def show_refined(conversion: "Conversion", result: "Result") -> None:
    """Print how many matrices of each part were refined, and what became of their errors."""
    parts = _parts(conversion, result)
    if not parts:
        return
    rows = [
        (
            part.role,
            part.part,
            f"{part.matrices:,}",
            f"{part.refined:,}",
            f"{part.fitted:.3f}",
            "-" if part.held_out is None else f"{part.held_out:.3f}",
        )
        for part in parts
    ]
    print("\nrefined: error after / before, as fitted and on held-out tokens")
    print_table(("role", "part", "matrices", "refined", "fitted", "held out"), rows, numbers_from=2)


def refined_json(conversion: "Conversion", result: "Result") -> dict[str, Any]:
    """Return the table for --json; empty without refinement."""
    parts = _parts(conversion, result)
    return {"refined": [asdict(part) for part in parts]} if parts else {}


def _parts(conversion: "Conversion", result: "Result") -> "Sequence[PartResult]":
    if not result.refined:
        return ()
    from dots1_local.convert.refined_results import by_part

    return by_part(conversion.tensors, result.refined)
