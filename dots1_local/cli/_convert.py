"""`dots1 convert`: a Hugging Face checkpoint, here or on the hub, to one GGUF file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dots1_local.cli._allocation import (
    Bpw,
    Calibration,
    Context,
    FitMemory,
    KVType,
    MaxKLD,
    Size,
    allocation_json,
    nats,
    print_allocation,
    read_budget,
    warn_of_budget,
    warn_of_importance,
)
from dots1_local.cli._hub import LowDisk, Revision, hub_json, open_source, print_shards
from dots1_local.cli._output import (
    Json,
    Threads,
    human_bytes,
    notice,
    notice_resumed,
    print_json,
    progress_bar,
)

if TYPE_CHECKING:
    from dots1_local.convert import Budget, Conversion
    from dots1_local.files.checkpoint import Checkpoint

__all__ = ["convert"]

_TYPES = "Types"


def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Folder with config.json and safetensors, or organisation/model on the Hugging "
            "Face hub."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The GGUF file to write.")
    ] = None,
    type_: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="DQ2 to DQ6 (dynamic: routed experts low, the rest high), or a stock mix of "
            "llama-quantize: Q4_K_M, IQ2_XXS, BF16, ...",
            show_default="DQ4",
            rich_help_panel=_TYPES,
        ),
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=TYPE",
            help="Set the type of tensors by name; repeatable.",
            rich_help_panel=_TYPES,
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            help="Importance file of llama-imatrix (GGUF or .dat).", rich_help_panel=_TYPES
        ),
    ] = None,
    pad_experts: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(
            help="Zero-pad expert width to a multiple of 256, so that every type fits.",
            rich_help_panel=_TYPES,
        ),
    ] = "auto",
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Take every type from this plan (from --dry-run --json).", rich_help_panel=_TYPES
        ),
    ] = None,
    calibration: Calibration = None,
    size: Size = None,
    bpw: Bpw = None,
    max_kld: MaxKLD = None,
    fit_memory: FitMemory = None,
    context: Context = None,
    kv_type: KVType = None,
    split_max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Write shards of at most SIZE, e.g. 48G.")
    ] = None,
    revision: Revision = None,
    low_disk: LowDisk = False,
    threads: Threads = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the table of types and sizes; write nothing.")
    ] = False,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="With --dry-run: a row for every tensor.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
    json: Json = False,
) -> None:
    """Convert a safetensors checkpoint to a quantised GGUF.

    An interrupted conversion goes on where it stopped when the same command is run again.

    Examples:

      dots1 convert dots.llm1.inst -o dots.gguf

      dots1 convert dots.llm1.inst -o dots.gguf --type DQ2 --imatrix imatrix.gguf

      dots1 convert dots.llm1.inst -o 48.gguf --size 48GB --calibration calibrated

      dots1 convert dots.llm1.inst --type Q4_K_M --dry-run

      dots1 convert rednote-hilab/dots.llm1.inst -o dots.gguf --low-disk
    """
    from functools import cache

    from dots1_local.sizes import parse_size

    if output is None and not dry_run:
        raise typer.BadParameter("name the file to write", param_hint="--output / -o")
    if plan and (type_ is not None or tensor_type or pad_experts != "auto"):
        raise typer.BadParameter("a plan sets all types and the padding", param_hint="--plan")
    split = None if split_max_size is None else parse_size(split_max_size)
    source = cache(lambda: open_source(checkpoint, revision, low_disk))
    budget = read_budget(
        lambda: source().config,
        calibration,
        size=size,
        bpw=bpw,
        max_kld=max_kld,
        fit_memory=fit_memory,
        context=context,
        kv_type=kv_type,
    )
    conversion = _prepare(
        source(),
        budget,
        type_,
        plan,
        calibration,
        split,
        imatrix=imatrix,
        padding=pad_experts,
        overrides=tensor_type or [],
    )
    file_bytes = conversion.file_bytes(split)
    _warn(conversion, calibration)
    _warn_of_overrides(conversion, tensor_type or [])
    warn_of_budget(conversion, budget, file_bytes)
    if dry_run or output is None:
        _show(conversion, tensors, json, file_bytes)
        if not json:
            print_shards(conversion, file_bytes)
        return
    result = _run(
        conversion, output, split_max_size=split, threads=threads, force=force, low_disk=low_disk
    )
    if json:
        print_json({**_summary(conversion, file_bytes), "files": [str(path) for path in result]})
    else:
        _show(conversion, tensors, json, file_bytes)
        print("wrote " + ", ".join(str(path) for path in result))


def _prepare(
    checkpoint: "Checkpoint",
    budget: "Budget | None",
    type_: str | None,
    plan: Path | None,
    calibration: Path | None,
    split: int | None,
    *,
    imatrix: Path | None,
    padding: Literal["auto", "on", "off"],
    overrides: list[str],
) -> "Conversion":
    from dots1_local.convert import Conversion
    from dots1_local.quant.plan import load_plan

    if budget is None or calibration is None:
        recipe = load_plan(plan) if plan else "DQ4" if type_ is None else type_
        return Conversion.prepare(
            checkpoint,
            recipe,
            imatrix=imatrix,
            calibration=calibration,
            padding=padding,
            overrides=overrides,
        )
    if type_ is not None or plan is not None:
        raise typer.BadParameter("--type and --plan leave a budget nothing to decide")
    conversion = Conversion.allocate(
        checkpoint,
        budget,
        calibration=calibration,
        imatrix=imatrix,
        padding=padding,
        overrides=overrides,
        split_max_size=split,
    )
    warn_of_importance(conversion, calibration)
    return conversion


def _run(conversion: "Conversion", output: Path, **options: Any) -> tuple[Path, ...]:
    try:
        with progress_bar(output.name) as progress:
            result = conversion.run(output, **options, progress=progress, on_resume=notice_resumed)
    except KeyboardInterrupt:
        notice("stopped; run the same command again to go on from here")
        raise typer.Exit(130) from None
    return result.paths


def _warn(conversion: "Conversion", calibration: Path | None) -> None:
    recipe, importance = conversion.plan.recipe, conversion.importance
    if calibration is not None and conversion.predicted_kl is None:
        notice(
            f"no KL divergence is predicted: {calibration} holds no measurement of all these "
            "types with this importance"
        )
    if recipe.endswith("without importance"):
        notice(f"{recipe}: --imatrix FILE makes this size better")
    if importance is not None and importance.partial:
        count = sum(len(experts) for experts in importance.partial.values())
        notice(
            f"{importance.path.name} has no data for {count} experts in "
            f"{len(importance.partial)} tensors; their columns count equally"
        )


def _warn_of_overrides(conversion: "Conversion", overrides: list[str]) -> None:
    from dots1_local.quant.plan import parse_override
    from dots1_local.quant.stock import is_quantisable

    for text in overrides:
        pattern = parse_override(text).pattern
        if not any(
            pattern.search(t.spec.name) for t in conversion.tensors if is_quantisable(t.spec)
        ):
            notice(f"--tensor-type {text} changes nothing: no tensor that can be quantised matches")


def _show(conversion: "Conversion", tensors: bool, json: bool, file_bytes: int) -> None:
    from dots1_local.cli._output import print_table, size_table

    if json:
        print_json(_summary(conversion, file_bytes))
        return
    if tensors:
        rows = [
            (t.spec.name, t.kind.name, " x ".join(map(str, t.spec.shape)), human_bytes(t.nbytes))
            for t in conversion.tensors
        ]
        print_table(("tensor", "type", "shape", "bytes"), rows, numbers_from=2)
        print()
    if conversion.allocation is not None:
        print_allocation(conversion, conversion.allocation, file_bytes)
        return
    size_table(
        (t.spec.role, t.kind.name, t.spec.source_elements, t.nbytes) for t in conversion.tensors
    )
    if conversion.predicted_kl is not None:
        print(f"\npredicted KL divergence: {nats(conversion.predicted_kl)} nats a token")


def _summary(conversion: "Conversion", file_bytes: int) -> dict[str, Any]:
    """The plan, as --plan reads it, and what it comes to."""
    from json import loads

    parameters = sum(tensor.spec.source_elements for tensor in conversion.tensors)
    allocation = conversion.allocation
    return {
        **loads(conversion.plan.to_json()),
        "parameters": parameters,
        "bytes": conversion.nbytes,
        "file_bytes": file_bytes,
        "bpw": conversion.nbytes * 8 / parameters,
        "predicted_kl": conversion.predicted_kl,
        **({"allocation": allocation_json(conversion, allocation)} if allocation else {}),
        **hub_json(conversion),
    }
