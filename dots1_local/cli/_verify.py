"""`dots1 verify`: check a GGUF file, and write a copy with corrected keys."""

from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dots1_local.cli._model import local_model
from dots1_local.cli._options import (
    Json,
    Model,
    Threads,
    exit_on_interrupt,
    flag,
    option,
    verb,
)
from dots1_local.cli._output import notice, plural, print_json, print_table, progress_bar
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dots1_local.verify import Report

__all__ = ["VerifyOptions", "verify"]


@dataclass(frozen=True, eq=False, repr=False)
class VerifyOptions:
    file: Model
    against: Path | None = option(
        "Compare keys, and the relative error of every tensor, with the checkpoint that the file "
        "was made of.",
        metavar="CHECKPOINT",
    )
    fix: Path | None = option(
        "Write a copy with corrected keys and the same tensors. The copy of a split file is "
        "OUT-00001-of-0000N.gguf and so on.",
        metavar="OUT.gguf",
    )
    quick: bool = flag("Check the header only, not the data of tensors.", "--quick")
    force: bool = flag("Replace an existing OUT.gguf.", "--force")
    threads: Threads = None
    json: Json = False


@verb
def verify(options: VerifyOptions) -> None:
    """Check header, keys, tensors and every block of a file; exit with 1 if there is an error.

    dots1 verify dots1-Q4_K_M.gguf

    dots1 verify dots1-Q4_K_M.gguf --against dots.llm1.inst

    dots1 verify dots1-Q4_K_M.gguf --quick --fix fixed.gguf
    """
    from dots1_local.verify import verify_gguf
    from dots1_local.verify.fix import check_output

    file, fix, force = local_model(options.file), options.fix, options.force
    if fix:
        check_output(file, fix, force=force)
    with exit_on_interrupt("stopped; nothing was written"):
        with progress_bar(file.name) as progress:
            report = verify_gguf(
                file,
                options.against,
                quick=options.quick,
                threads=options.threads,
                progress=progress,
            )
        if not options.json:
            _print(report)
        fixed = _fix(report, fix, force) if fix else ()
    if options.json:
        print_json(_as_json(report, fixed))
    left = [f for f in report.findings if f.severity == "error" and not (fixed and f.changes)]
    if left:
        raise typer.Exit(1)


def _fix(report: "Report", output: Path, force: bool) -> "Sequence[Path]":
    from dots1_local.verify.fix import write_fixed

    if not report.changes:
        notice(f"no key has to be corrected; {output} is not written")
        return ()
    with progress_bar(output.name) as progress:
        paths = write_fixed(report, output, force=force, progress=progress)
    keys = ", ".join(change.key for change in report.changes)
    notice(f"wrote {', '.join(map(str, paths))} with {keys} corrected")
    return paths


def _print(report: "Report") -> None:
    for finding in report.findings:
        # The message may quote a file, whose control characters must not reach the terminal.
        message = "".join(c if c.isprintable() else " " for c in finding.message)
        print(f"{finding.severity}: {message}")
    if worst := report.worst():
        header = ("tensor", "role", "type", "relative error", "worst expert")
        rows = []
        for t in worst:
            expert = f"{t.worst_error:.5f} ({t.worst_expert})" if len(t.shape) == 3 else ""
            rows.append((t.name, t.role, t.type, f"{t.error:.5f}", expert))
        print_table(header, rows, numbers_from=3)
        print()
    counts = [
        plural(count, severity)
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


def _as_json(report: "Report", fixed: "Sequence[Path]") -> dict[str, Any]:
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
