"""`dots1 export`: decode a GGUF file to a Hugging Face checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dots1_local.cli._options import (
    Json,
    Threads,
    argument,
    exit_on_interrupt,
    flag,
    option,
    verb,
)
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

__all__ = ["ExportOptions", "export"]


@dataclass(frozen=True, eq=False, repr=False)
class ExportOptions:
    file: Path = argument("A dots1 GGUF file, or any shard of a split one.", metavar="FILE.gguf")
    output: Path | None = option(
        "Write to this folder. Optional with --dry-run.", "--output", "-o", metavar="DIR"
    )
    shard_size: str = option("Write shards of at most SIZE.", value="5GB", metavar="SIZE")
    threads: Threads = None
    dry_run: bool = flag("Print what would be written, and write nothing.", "--dry-run")
    force: bool = flag("Replace an earlier export in DIR.", "--force", "-f")
    json: Json = False


@verb
def export(options: ExportOptions) -> None:
    """Decode a GGUF file to a Hugging Face checkpoint in bf16.

    transformers, and whatever builds on it, can then evaluate the quantised model. If an export is
    interrupted, the same command resumes it at the shard where it stopped.

    Examples:

      dots1 export dots.gguf -o dots-decoded

      dots1 export dots.gguf --dry-run
    """
    from dots1_local.export import Export
    from dots1_local.sizes import parse_size

    output, threads = options.output, options.threads
    if output is None and not options.dry_run:
        raise typer.BadParameter("name the folder to write", param_hint="--output / -o")
    size = parse_size(options.shard_size)
    written: tuple[Path, ...] = ()
    with exit_on_interrupt("stopped; run the same command again to resume"):
        with progress_bar(options.file.name) as report:
            prepared = Export.prepare(
                options.file, shard_size=size, threads=threads, progress=report
            )
        for sentence in prepared.notices:
            notice(sentence)
        if output is not None and not options.dry_run:
            with progress_bar(output.name) as report:
                written = prepared.run(
                    output,
                    threads=threads,
                    force=options.force,
                    progress=report,
                    on_resume=notice_resumed,
                ).files
    if options.json:
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
