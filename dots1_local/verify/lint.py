"""Everything that the header of a dots1 GGUF shows to be wrong."""

from itertools import chain
from reprlib import repr as brief

from dots1_local.errors import GGUFError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.gguf import GGUFFile
from dots1_local.verify.findings import Finding
from dots1_local.verify.numbers import config_of, lint_numbers
from dots1_local.verify.tensors import lint_tensors
from dots1_local.verify.tokens import lint_template, lint_tokenizer

__all__ = ["check_loadable", "lint"]


def lint(gguf: GGUFFile, checkpoint: Checkpoint | None = None) -> list[Finding]:
    """What is wrong with keys and tensors, the worst first.

    Raises:
        CheckpointError: the checkpoint's tokenizer is not readable.
    """
    if other := _other(gguf):
        return [other]
    findings = list(lint_numbers(gguf, checkpoint.config if checkpoint else None))
    findings += lint_tensors(gguf, config_of(gguf))
    findings += _tokenizer(gguf, checkpoint)
    return sorted(findings, key=lambda found: ("error", "warning", "note").index(found.severity))


def check_loadable(gguf: GGUFFile) -> None:
    """Refuse what llama.cpp would not load, load wrong, or abort the process over.

    What only a chat needs is not looked at: its markers, its ends and its template.

    Raises:
        GGUFError: another architecture, no model at all, or something is wrong with it.
    """
    found = _other(gguf) or _obstacle(gguf)
    if found:
        raise GGUFError(f"dots1 verify finds in {gguf.files[0]}: {found.message}")


def _obstacle(gguf: GGUFFile) -> Finding | None:
    findings = chain(
        lint_numbers(gguf, None),
        lint_tensors(gguf, config_of(gguf)),
        (found for found in lint_tokenizer(gguf, None) if found.check == "tokenizer"),
    )
    return next((found for found in findings if found.severity == "error"), None)


def _other(gguf: GGUFFile) -> Finding | None:
    """What is said, and all that is said, of a file that holds no dots1 model."""
    architecture = gguf.keys.get("general.architecture")
    if architecture != "dots1":
        message = (
            f"it is a model of architecture {brief(architecture)}; dots1-local runs dots1 only"
        )
        return Finding("architecture", "error", message)
    if not gguf.tensors:
        return Finding("tensors", "error", "it holds no tensors: it is a vocabulary, no model")
    return None


def _tokenizer(gguf: GGUFFile, checkpoint: Checkpoint | None) -> list[Finding]:
    right = None
    if checkpoint:
        from dots1_local.convert.metadata import end_tokens
        from dots1_local.convert.tokenizer import read_tokenizer

        ends = end_tokens(checkpoint)
        right = read_tokenizer(checkpoint.path, checkpoint.config.vocab_size, ends)
    template = right.chat_template if right else None
    return [
        *lint_tokenizer(gguf, right),
        *lint_template(gguf, template, compared=bool(right)),
    ]
