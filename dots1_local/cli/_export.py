"""`dots1 export`: a GGUF to a Hugging Face checkpoint of what it decodes to."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    from dots1_local.export import Export

__all__ = ["export"]


def export(
    file: Annotated[
        Path,
        typer.Argument(help="A dots1 GGUF (any shard of a split one).", metavar="FILE.gguf"),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to write.", metavar="DIR")
    ] = None,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Write shards of at most SIZE.")
    ] = "5GB",
    threads: Threads = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written; write nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Replace a former export in DIR.")
    ] = False,
    json: Json = False,
) -> None:
    """Write what a GGUF decodes to as a Hugging Face checkpoint, in bf16.

    transformers, and whatever builds on it, then evaluates the quantised model. An interrupted
    export goes on at the shard where it stopped when the same command is run again.

    Examples:

      dots1 export dots.gguf -o dots-decoded

      dots1 export dots.gguf --dry-run
    """
    from dots1_local.export import Export
    from dots1_local.sizes import parse_size

    if output is None and not dry_run:
        raise typer.BadParameter("name the folder to write", param_hint="--output / -o")
    try:
        with progress_bar(file.name) as progress:
            prepared = Export.prepare(
                file, shard_size=parse_size(shard_size), threads=threads, progress=progress
            )
        for sentence in prepared.notices:
            notice(sentence)
        if dry_run or output is None:
            _show(prepared, json)
            return
        with progress_bar(output.name) as progress:
            result = prepared.run(
                output, threads=threads, force=force, progress=progress, on_resume=notice_resumed
            )
    except KeyboardInterrupt:
        notice("stopped; run the same command again to go on from here")
        raise typer.Exit(130) from None
    if json:
        print_json({**_summary(prepared), "files": [str(path) for path in result.files]})
    else:
        _show(prepared, json)
        print(f"wrote {result.path}")


def _show(export: "Export", json: bool) -> None:
    from dots1_local.cli._output import size_table

    if json:
        print_json(_summary(export))
        return
    size_table(
        (tensor.role, tensor.dtype, tensor.rows * tensor.columns, tensor.nbytes)
        for shard in export.shards
        for tensor, _ in shard.tensors
    )
    width, stored = export.config.moe_intermediate_size, export.stored_width
    cut = f", experts {width} wide, without the padding to {stored}" if width != stored else ""
    count = len(export.shards)
    print(f"\n{human_bytes(export.nbytes)} in {count} shard{'s' * (count != 1)}{cut}")


def _summary(export: "Export") -> dict[str, Any]:
    return {
        "bytes": export.nbytes,
        "shards": {shard.name: shard.nbytes for shard in export.shards},
        "expert_width": export.config.moe_intermediate_size,
        "stored_expert_width": export.stored_width,
        "notices": list(export.notices),
    }
