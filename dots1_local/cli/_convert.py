"""`dots1 convert`: convert a Hugging Face checkpoint, in a folder or on the hub, to a GGUF file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dots1_local.cli._convert_budget import check_options, memory_budget, read_budget
from dots1_local.cli._convert_options import ConvertOptions
from dots1_local.cli._fit import draw_front, fit_machine, show_fit, store_placement
from dots1_local.cli._open import open_checkpoint
from dots1_local.cli._options import exit_on_interrupt, verb
from dots1_local.cli._output import notice, notice_resumed, print_json, progress_bar
from dots1_local.cli._refine import measured_folder, refined_json, show_refined

if TYPE_CHECKING:
    from dots1_local.convert import Budget, Conversion, Result
    from dots1_local.devices.hardware import Hardware
    from dots1_local.files.checkpoint import Checkpoint
    from dots1_local.fit.front import Fit
    from dots1_local.quant.plan import QuantPlan

__all__ = ["convert"]


@verb
def convert(options: ConvertOptions) -> None:
    """Convert a safetensors checkpoint to a quantised GGUF file.

    If a conversion is interrupted, the same command resumes it.

    Examples:

      dots1 convert dots.llm1.inst -o dots.gguf

      dots1 convert dots.llm1.inst -o dots.gguf --type DQ2 --imatrix imatrix.gguf

      dots1 convert dots.llm1.inst -o 48.gguf --size 48GB --calibration calibrated

      dots1 convert dots.llm1.inst -o 48.gguf --size 48GB --refine -f calibration.txt

      dots1 convert dots.llm1.inst -o mine.gguf --for this --calibration calibrated

      dots1 convert dots.llm1.inst --for 24gb-64gb --calibration calibrated --dry-run

      dots1 convert dots.llm1.inst --type Q4_K_M --dry-run

      dots1 convert rednote-hilab/dots.llm1.inst -o dots.gguf --low-disk
    """
    from dots1_local.cli import _convert_report as report
    from dots1_local.sizes import parse_size

    check_options(options)
    split = None if options.split_max_size is None else parse_size(options.split_max_size)
    budget = read_budget(options) if options.for_ is None else None
    checkpoint = open_checkpoint(options.checkpoint, options.revision, options.low_disk)
    if options.fit_memory is not None:
        budget = memory_budget(checkpoint.config, options.fit_memory, options)
    calibration = measured_folder(checkpoint, options)
    fitted: tuple[Fit, Hardware] | None = None
    if options.for_ is not None and calibration is not None:
        conversion, fitted = _fitted(checkpoint, calibration, split, options)
    else:
        conversion = _prepare(checkpoint, budget, calibration, split, options)
    file_bytes = conversion.file_bytes(split)
    report.warn(conversion, options.tensor_type or [], calibration, budget, file_bytes)
    result = None
    if options.output is not None and not options.dry_run:
        result = _run(conversion, options.output, split, options)
        if fitted:
            store_placement(result.paths[0], fitted[1], fitted[0])
    if options.json:
        written = _written(conversion, result) if result else {}
        machine = {"for": fitted[0].to_json()} if fitted else {}
        print_json(report.summary(conversion, file_bytes) | machine | written)
        return
    if fitted:
        show_fit(fitted[0])
    report.show(conversion, file_bytes, tensors=options.tensors)
    if result:
        show_refined(conversion, result)
        print("wrote " + ", ".join(map(str, result.paths)))
    else:
        report.show_hub(conversion, file_bytes)


def _fitted(
    checkpoint: "Checkpoint", calibration: Path, split: int | None, options: ConvertOptions
) -> "tuple[Conversion, tuple[Fit, Hardware]]":
    """Decide the types for the machine, of which --size limits the file with its headers."""
    from dots1_local.convert import Conversion
    from dots1_local.files.partial_file import check_parent
    from dots1_local.sizes import parse_size

    if options.front:
        check_parent(options.front)

    def conversion_of(recipe: "QuantPlan | str") -> Conversion:
        return Conversion.prepare(
            checkpoint,
            recipe,
            imatrix=options.imatrix,
            calibration=calibration,
            refine=options.refine,
            encoder=options.encoder,
        )

    conversion = conversion_of("DQ4")
    while True:
        overhead = conversion.file_bytes(split) - conversion.nbytes
        found, machine = fit_machine(checkpoint, calibration, overhead, options)
        conversion = conversion_of(found.chosen.plan)
        if options.size is None or conversion.file_bytes(split) <= parse_size(options.size):
            break
    if options.front:
        draw_front(options.front, found)
    return conversion, (found, machine)


def _prepare(
    checkpoint: "Checkpoint",
    budget: "Budget | None",
    calibration: Path | None,
    split: int | None,
    options: ConvertOptions,
) -> "Conversion":
    from dots1_local.convert import Conversion
    from dots1_local.quant.plan import load_plan

    imatrix, padding = options.imatrix, options.pad_experts
    overrides = options.tensor_type or []
    recipe = load_plan(options.plan) if options.plan else options.type_
    if budget is not None and calibration is not None:
        return Conversion.allocate(
            checkpoint,
            budget,
            calibration=calibration,
            imatrix=imatrix,
            padding=padding,
            overrides=overrides,
            split_max_size=split,
            refine=options.refine,
            encoder=options.encoder,
            one_layout=options.one_layout,
        )
    return Conversion.prepare(
        checkpoint,
        "DQ4" if recipe is None else recipe,
        imatrix=imatrix,
        calibration=calibration,
        padding=padding,
        overrides=overrides,
        refine=options.refine,
        encoder=options.encoder,
    )


def _run(
    conversion: "Conversion", output: Path, split: int | None, options: ConvertOptions
) -> "Result":
    with (
        exit_on_interrupt("stopped; run the same command again to resume"),
        progress_bar(output.name) as progress,
    ):
        return conversion.run(
            output,
            split_max_size=split,
            threads=options.threads,
            force=options.force,
            low_disk=options.low_disk,
            device=options.device,
            precision=options.precision,
            progress=progress,
            on_resume=notice_resumed,
            notify=notice,
        )


def _written(conversion: "Conversion", result: "Result") -> dict[str, Any]:
    return {"files": [str(path) for path in result.paths]} | refined_json(conversion, result)
