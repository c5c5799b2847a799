"""`dots1 convert`: convert a Hugging Face checkpoint, in a folder or on the hub, to a GGUF file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dots1_local.cli._convert_budget import check_options, memory_budget, read_budget
from dots1_local.cli._fit import draw_front, fit_machine, show_fit, store_placement
from dots1_local.cli._options import (
    CHECKPOINT,
    HUB_PANEL,
    Json,
    Revision,
    Threads,
    argument,
    exit_on_interrupt,
    flag,
    open_checkpoint,
    option,
    text_file,
    verb,
)
from dots1_local.cli._output import notice, notice_resumed, print_json, progress_bar
from dots1_local.cli._refine import measured_folder, refined_json, show_refined

if TYPE_CHECKING:
    from dots1_local.convert import Budget, Conversion, Result
    from dots1_local.devices.hardware import Hardware
    from dots1_local.files.checkpoint import Checkpoint
    from dots1_local.fit.front import Fit
    from dots1_local.quant.plan import QuantPlan

__all__ = ["ConvertOptions", "convert"]

_TYPES = "Types"
_BUDGET = "Types under a budget, by what dots1 calibrate measured"
_MACHINE = "Types for a machine, by what dots1 calibrate and dots1 hardware measured"
_REFINEMENT = "Refinement"


@dataclass(frozen=True, eq=False, repr=False)
class ConvertOptions:
    checkpoint: str = argument(CHECKPOINT)
    output: Path | None = option("Write this GGUF file. Optional with --dry-run.", "--output", "-o")
    type_: str | None = option(
        "Use DQ2 to DQ6 (dynamic: routed experts in few bits, the rest in more), or a "
        "stock mix of llama-quantize: Q4_K_M, IQ2_XXS, BF16, ...",
        "--type",
        default="DQ4",
        panel=_TYPES,
    )
    tensor_type: list[str] | None = option(
        "Store the tensors whose names match in this type; repeatable.",
        metavar="REGEX=TYPE",
        panel=_TYPES,
    )
    imatrix: Path | None = option(
        "Use this importance file of llama-imatrix (GGUF or .dat).", panel=_TYPES
    )
    pad_experts: Literal["auto", "on", "off"] = option(
        "Zero-pad the width of experts to a multiple of 256, so that every type fits.",
        value="auto",
        panel=_TYPES,
    )
    encoder: Literal["ggml", "fast"] = option(
        "Encode the IQ types with importance by ggml, or by our encoder, which has less "
        "weighted error.",
        value="ggml",
        panel=_TYPES,
    )
    plan: Path | None = option(
        "Take every type from this file, which --dry-run --json wrote.", panel=_TYPES
    )
    calibration: str | None = option(
        "Use this folder, which dots1 calibrate wrote, or organisation/model on the hub, where "
        "such a folder is published. Without a budget, its importance file is used and the KL "
        "divergence is predicted.",
        metavar="DIR",
        panel=_BUDGET,
    )
    size: str | None = option(
        "Choose types for a file of at most SIZE, such as 48GB.", metavar="SIZE", panel=_BUDGET
    )
    bpw: float | None = option(
        "Choose types for at most this many bits per weight.", metavar="BITS", panel=_BUDGET
    )
    max_kld: float | None = option(
        "Choose types for the smallest file whose predicted KL divergence is at most this.",
        metavar="NATS",
        panel=_BUDGET,
    )
    fit_memory: str | None = option(
        "Choose types to fit '24GB gpu + 64GB ram', or a machine that dots1 plan --hardware takes.",
        metavar="MEMORY",
        panel=_BUDGET,
    )
    one_layout: bool = flag(
        "Store each matrix of the experts (gate, up, down) in one type in all layers; llama.cpp's "
        "expert cache is shared by layers of equal types only.",
        "--one-layout",
        panel=_BUDGET,
    )
    for_: str | None = option(
        "Choose types for quality and speed on this machine: 'this', or a description that "
        "dots1 plan --hardware takes. Without a target, take the knee of the front. The "
        "placement is stored beside the file, and chat and serve use it.",
        "--for",
        metavar="MACHINE",
        panel=_MACHINE,
    )
    tok_s: float | None = option(
        "With --for: the least KL divergence that decodes this fast after a long prompt.",
        metavar="TOK_S",
        panel=_MACHINE,
    )
    front: Path | None = option(
        "With --for and no target: draw the front to this SVG file.", metavar="FILE", panel=_MACHINE
    )
    context: str | None = option(
        "With --for or --fit-memory: leave room for this context, such as 32k.",
        metavar="TOKENS",
        default="16k, or what the model was trained for",
        panel=_MACHINE,
    )
    kv_type: str | None = option(
        "With --for or --fit-memory: keep the KV cache in this type.",
        metavar="TYPE",
        default="f16, or what dots1 plan takes",
        panel=_MACHINE,
    )
    refine: bool = flag(
        "Choose codes and scales whose errors cancel for the inputs of a calibration text: the "
        "same bytes have about half the KL divergence, in hours instead of minutes.",
        "--refine",
        panel=_REFINEMENT,
    )
    file: list[Path] | None = option(
        "With --refine: calibrate on this text first, into OUTPUT.calibration; - is what is piped "
        "in; repeatable.",
        "--file",
        "-f",
        parser=text_file,
        metavar="FILE",
        panel=_REFINEMENT,
    )
    chat: list[Path] | None = option(
        "With --refine: calibrate on these conversations, as dots1 calibrate does; repeatable.",
        metavar="FILE.jsonl",
        panel=_REFINEMENT,
    )
    device: str | None = option(
        "With --refine: compute the layers on this torch device.",
        default="a GPU if there is one",
        panel=_REFINEMENT,
    )
    precision: Literal["F32", "BF16"] = option(
        "With --refine: multiply the layers' matrices in this type.",
        value="F32",
        panel=_REFINEMENT,
    )
    split_max_size: str | None = option(
        "Write shards of at most SIZE, such as 48G.", metavar="SIZE"
    )
    revision: Revision = None
    low_disk: bool = flag(
        "Fetch, convert and delete one shard after another: the disk needs room for the "
        "GGUF file and a few shards.",
        "--low-disk",
        panel=HUB_PANEL,
    )
    threads: Threads = None
    dry_run: bool = flag("Print types and sizes, and write nothing.", "--dry-run")
    tensors: bool = flag("With --dry-run: print a row for every tensor.", "--tensors")
    force: bool = flag("Replace an existing file.", "--force")
    json: Json = False


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
