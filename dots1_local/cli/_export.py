"""`dots1 export`: decode a GGUF file to a Hugging Face checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dots1_local.cli._options import Json, ModelShard, Threads, exit_on_interrupt, option
from dots1_local.cli._output import (
    notice,
    notice_resumed,
    plural,
    print_json,
    print_sizes,
    progress_bar,
)
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from dots1_local.export import Export

__all__ = ["export"]


def export(
    file: ModelShard,
    output: Annotated[
        Path | None,
        option("Write to this folder. Optional with --dry-run.", "--output", "-o", metavar="DIR"),
    ] = None,
    shard_size: Annotated[str, option("Write shards of at most SIZE.", metavar="SIZE")] = "5GB",
    threads: Threads = None,
    dry_run: Annotated[
        bool, option("Print what would be written, and write nothing.", "--dry-run")
    ] = False,
    force: Annotated[bool, option("Replace an earlier export in DIR.", "--force", "-f")] = False,
    json: Json = False,
) -> None:
    """Decode a GGUF file to a Hugging Face checkpoint in bf16.

    transformers, and whatever builds on it, can then evaluate the quantised model. If an export is
    interrupted, the same command resumes it at the shard where it stopped.

    Examples:

      dots1 export dots.gguf -o dots-decoded

      dots1 export dots.gguf --dry-run
    """
    from dots1_local.export import Export
    from dots1_local.sizes import parse_size

    if output is None and not dry_run:
        raise typer.BadParameter("name the folder to write", param_hint="--output / -o")
    written: list[Path] = []
    with exit_on_interrupt("stopped; run the same command again to resume"):
        with progress_bar(file.name) as progress:
            prepared = Export.prepare(
                file, shard_size=parse_size(shard_size), threads=threads, progress=progress
            )
        for sentence in prepared.notices:
            notice(sentence)
        if output is not None and not dry_run:
            with progress_bar(output.name) as progress:
                written += prepared.run(
                    output,
                    threads=threads,
                    force=force,
                    progress=progress,
                    on_resume=notice_resumed,
                ).files
    if json:
        files = {"files": [str(path) for path in written]} if written else {}
        print_json(_summary(prepared) | files)
        return
    _show(prepared)
    if written:
        print(f"wrote {output}")


def _show(export: "Export") -> None:
    print_sizes(
        (tensor.role, tensor.dtype, tensor.rows * tensor.columns, tensor.nbytes)
        for shard in export.shards
        for tensor, _ in shard.tensors
    )
    width, stored = export.config.moe_intermediate_size, export.stored_width
    cut = f", experts {width} wide, without the padding to {stored}" if width != stored else ""
    print(f"\n{human_bytes(export.nbytes)} in {plural(len(export.shards), 'shard')}{cut}")


def _summary(export: "Export") -> dict[str, Any]:
    return {
        "bytes": export.nbytes,
        "shards": {shard.name: shard.nbytes for shard in export.shards},
        "expert_width": export.config.moe_intermediate_size,
        "stored_expert_width": export.stored_width,
        "notices": list(export.notices),
    }
