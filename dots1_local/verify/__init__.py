"""Is a dots1 GGUF, ours or anybody's, what it should be? And the keys that put it right."""

from pathlib import Path

from dots1_local.architecture import TensorSpec
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.gguf import GGUFFile
from dots1_local.progress import Progress, silent
from dots1_local.verify.findings import Change, Finding, Report, Severity, TensorCheck
from dots1_local.verify.lint import lint
from dots1_local.verify.numbers import conflicts
from dots1_local.verify.tensors import expected_tensors

__all__ = ["Change", "Finding", "Report", "Severity", "TensorCheck", "verify_gguf"]


def verify_gguf(
    path: str | Path,
    against: str | Path | None = None,
    *,
    quick: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> Report:
    """Check header, keys, tensors and every block of the GGUF at `path` (any shard of a split one).

    `against` is the checkpoint it was made of: keys are compared with it, and every tensor by
    relative error. `quick` leaves the tensors' data unread.

    Raises:
        GGUFError: not a GGUF, or damaged so that its header cannot be read.
        CheckpointError: `against` is incomplete or corrupt, or of another architecture.
    """
    gguf = GGUFFile.open(path)
    checkpoint = source = Checkpoint.open(against) if against else None
    findings = []
    if source and (other := conflicts(gguf, source.config)):
        message = f"it is not made of {source.path}: {', '.join(other)}"
        findings, checkpoint = [Finding("against", "error", message)], None
    findings += lint(gguf, checkpoint)
    checks: tuple[TensorCheck, ...] = ()
    if not quick:
        from dots1_local.verify.check_blocks import examine
        from dots1_local.verify.findings import judge

        specs = _comparable(gguf, checkpoint) if checkpoint else {}
        checks = examine(gguf, checkpoint, specs, threads=threads, progress=progress)
        findings += judge(checks)
    nbytes = sum(tensor.nbytes for tensor in gguf.tensors)
    compared = source.path if source else None
    return Report(gguf.files, len(gguf.tensors), nbytes, compared, tuple(findings), checks)


def _comparable(gguf: GGUFFile, checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """The tensors that are stored in the shape the checkpoint gives them, padded or not."""
    config = checkpoint.config
    found = {tensor.name: tensor.shape for tensor in gguf.tensors}
    routed = (shape for name, shape in found.items() if name.endswith(".ffn_gate_exps.weight"))
    widths = [shape[1] for shape in routed if len(shape) == 3]
    width = max([*widths[:1], config.moe_intermediate_size])
    specs = expected_tensors(config, gguf, width)
    checkpoint.check(specs)
    return {spec.name: spec for spec in specs if found.get(spec.name) == spec.shape}
