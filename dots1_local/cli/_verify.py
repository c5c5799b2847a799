"""`dots1 verify`: is a GGUF file what it should be, and a corrected copy where keys are wrong."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dots1_local.cli._output import Json, Threads, human_bytes, notice, print_json, progress_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dots1_local.verify import Report, TensorCheck

__all__ = ["verify"]


def verify(
    file: Annotated[
        Path,
        typer.Argument(help="A dots1 GGUF (any shard of a split one).", metavar="FILE.gguf"),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            help="The checkpoint it was made of: compare keys, and every tensor by relative error.",
            metavar="CHECKPOINT",
        ),
    ] = None,
    fix: Annotated[
        Path | None,
        typer.Option(
            "--fix",
            help="Write a copy with corrected keys; tensors are copied as they are, and a split "
            "file becomes OUT-00001-of-0000N.gguf and so on.",
            metavar="OUT.gguf",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Check the header only, not the tensors' data.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT.gguf.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Check header, keys, tensors and every block of a file; exit 1 if there is an error.

    dots1 verify dots1-Q4_K_M.gguf

    dots1 verify dots1-Q4_K_M.gguf --against dots.llm1.inst

    dots1 verify dots1-Q4_K_M.gguf --quick --fix fixed.gguf
    """
    from dots1_local.verify import verify_gguf
    from dots1_local.verify.fix import check_output

    if fix:
        check_output(file, fix, force=force)
    try:
        with progress_bar(file.name) as progress:
            report = verify_gguf(file, against, quick=quick, threads=threads, progress=progress)
        if not as_json:
            _print(report)
        fixed = _fix(report, fix, force) if fix else ()
    except KeyboardInterrupt:
        notice("stopped; nothing was written")
        raise typer.Exit(130) from None
    if as_json:
        print_json(_as_json(report, fixed))
    left = [f for f in report.findings if f.severity == "error" and not (fixed and f.changes)]
    if left:
        raise typer.Exit(1)


def _fix(report: "Report", output: Path, force: bool) -> "Sequence[Path]":
    from dots1_local.verify.fix import write_fixed

    if not report.changes:
        notice(f"no key is to be corrected; {output} is not written")
        return ()
    with progress_bar(output.name) as progress:
        paths = write_fixed(report, output, force=force, progress=progress)
    keys = ", ".join(change.key for change in report.changes)
    notice(f"wrote {', '.join(map(str, paths))} with {keys} corrected")
    return paths


def _print(report: "Report") -> None:
    for finding in report.findings:
        # A file's own words, such as a template's, keep their hands off the terminal.
        message = "".join(c if c.isprintable() else " " for c in finding.message)
        print(f"{finding.severity}: {message}")
    if worst := report.worst():
        _print_worst(worst)
    counts = [
        f"{count} {severity}{'s' * (count != 1)}"
        for severity in ("error", "warning", "note")
        if (count := sum(finding.severity == severity for finding in report.findings))
    ]
    bad = sum(bool(tensor.bad_blocks) for tensor in report.tensors)
    blocks = f"{bad} with damaged blocks" if bad else "every block finite"
    exact = sum(tensor.error == 0 for tensor in report.tensors)
    equal = f"{exact} exactly the checkpoint's, " if report.against and exact else ""
    print(
        f"{report.files[0]}: {report.n_tensors} tensors, {human_bytes(report.nbytes)}, {equal}"
        f"{blocks if report.tensors else 'blocks not looked at'}; "
        f"{', '.join(counts) or 'nothing wrong'}"
    )


def _print_worst(tensors: "Sequence[TensorCheck]") -> None:
    from dots1_local.cli._output import print_table

    header = ("tensor", "role", "type", "relative error", "worst expert")
    print_table(header, map(_row, tensors), numbers_from=3)
    print()


def _row(tensor: "TensorCheck") -> tuple[str, ...]:
    many = len(tensor.shape) == 3
    worst = f"{tensor.worst_error:.5f} ({tensor.worst_expert})" if many else ""
    return tensor.name, tensor.role, tensor.type, f"{tensor.error:.5f}", worst


def _as_json(report: "Report", fixed: "Sequence[Path]") -> dict[str, Any]:
    from dataclasses import asdict
    from math import isfinite

    findings = [
        {
            "check": finding.check,
            "severity": finding.severity,
            "message": finding.message,
            "fix": [change.key for change in finding.changes],
        }
        for finding in report.findings
    ]
    tensors = [asdict(tensor) for tensor in report.tensors]
    for tensor in tensors:
        for key in ("error", "worst_error"):  # JSON has no infinity
            if tensor[key] is not None and not isfinite(tensor[key]):
                tensor[key] = None
    return {
        "files": [str(path) for path in report.files],
        "ok": report.ok,
        "bytes": report.nbytes,
        "against": str(report.against) if report.against else None,
        "findings": findings,
        "tensors": tensors,
        "fixed": [str(path) for path in fixed],
    }
