"""What is wrong with a dots1 GGUF, our own or anybody's, and which keys would put it right."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from reprlib import repr as brief

from dots1_local.architecture import TensorSpec
from dots1_local.errors import GGUFError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.gguf import GGUFFile
from dots1_local.progress import Progress, silent
from dots1_local.verify.findings import Finding, Report, TensorCheck
from dots1_local.verify.numbers import conflicts, likely_config, lint_numbers
from dots1_local.verify.tensors import expected_tensors, has_scale, lint_tensors
from dots1_local.verify.tokens import lint_template, lint_tokenizer

__all__ = [
    "Finding", "Report", "TensorCheck", "check_loadable", "lint_header", "verify_gguf",
]  # fmt: skip


def verify_gguf(
    path: str | Path,
    against: str | Path | None = None,
    *,
    quick: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> Report:
    """Check header, keys, tensors and every block of the GGUF at `path` (any shard of a split one).

    `against` is the checkpoint that the file was made from: keys are compared with it, and every
    tensor by relative error. `quick` leaves the tensors' data unread.

    Raises:
        GGUFError: the file is not a GGUF file, or its header is too damaged to be read.
        CheckpointError: `against` is incomplete, corrupt, or of another architecture.
    """
    gguf = GGUFFile.open(path)
    checkpoint = source = Checkpoint.open(against) if against else None
    findings = []
    if source and (fields := conflicts(gguf, source.config)):
        message = f"the file was not made from {source.path}: {', '.join(fields)}"
        findings, checkpoint = [Finding("against", "error", message)], None
    findings += lint_header(gguf, checkpoint)
    checks: tuple[TensorCheck, ...] = ()
    if not quick:
        from dots1_local.verify.check_blocks import check_blocks
        from dots1_local.verify.findings import findings_from

        specs = _comparable(gguf, checkpoint) if checkpoint else {}
        checks = check_blocks(gguf, checkpoint, specs, threads=threads, progress=progress)
        findings += findings_from(checks)
    nbytes = sum(tensor.nbytes for tensor in gguf.tensors)
    compared = source.path if source else None
    return Report(gguf.files, len(gguf.tensors), nbytes, compared, tuple(findings), checks)


def check_loadable(gguf: GGUFFile) -> None:
    """Raise a GGUFError if llama.cpp would not load the file, would load it wrong, or would abort.

    What only a chat needs is not checked: markers, the tokens that end a response, the template.
    """
    found = _other_model(gguf) or next((f for f in _obstacles(gguf) if f.severity == "error"), None)
    if found:
        raise GGUFError(f"dots1 verify finds in {gguf.files[0]}: {found.message}")


def _obstacles(gguf: GGUFFile) -> Iterator[Finding]:
    yield from lint_numbers(gguf, None)
    yield from lint_tensors(gguf, likely_config(gguf))
    yield from (found for found in lint_tokenizer(gguf, None) if found.check == "tokenizer")


def lint_header(gguf: GGUFFile, checkpoint: Checkpoint | None = None) -> list[Finding]:
    """What the header shows to be wrong, the worst first."""
    if other := _other_model(gguf):
        return [other]
    tokenizer = None
    if checkpoint:
        from dots1_local.convert.metadata import end_tokens
        from dots1_local.convert.tokenizer import read_tokenizer

        ends = end_tokens(checkpoint)
        tokenizer = read_tokenizer(checkpoint.path, checkpoint.config.vocab_size, ends)
    template = tokenizer.chat_template if tokenizer else None
    findings = chain(
        lint_numbers(gguf, checkpoint.config if checkpoint else None),
        lint_tensors(gguf, likely_config(gguf)),
        lint_tokenizer(gguf, tokenizer),
        lint_template(gguf, template, compared=bool(tokenizer)),
    )
    return sorted(findings, key=lambda found: ("error", "warning", "note").index(found.severity))


def _other_model(gguf: GGUFFile) -> Finding | None:
    """The only finding about a file that holds no dots1 model."""
    architecture = gguf.keys.get("general.architecture")
    if architecture != "dots1":
        message = (
            f"it is a model of architecture {brief(architecture)}; dots1-local runs dots1 only"
        )
        return Finding("architecture", "error", message)
    if not gguf.tensors:
        return Finding("tensors", "error", "it holds no tensors: it is a vocabulary, not a model")
    return None


def _comparable(gguf: GGUFFile, checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """The tensors that are stored in the checkpoint's shape, padded or not, and that no scale
    multiplies, by name."""
    config = checkpoint.config
    found = {tensor.name: tensor.shape for tensor in gguf.tensors}
    routed = (shape for name, shape in found.items() if name.endswith(".ffn_gate_exps.weight"))
    widths = [shape[1] for shape in routed if len(shape) == 3]
    width = max([*widths[:1], config.moe_intermediate_size])
    specs = expected_tensors(config, gguf, width)
    checkpoint.check(specs)
    return {
        spec.name: spec
        for spec in specs
        if found.get(spec.name) == spec.shape and not has_scale(spec.name, found)
    }
