"""What verifying a file results in: findings, keys that would put them right, relative errors."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dots1_local.files.gguf_keys import KIND_IDS, Change, Kind

__all__ = [
    "ABORTS", "KIND_IDS", "REFUSES", "USUAL_ERROR", "Change", "Finding", "Kind", "Report",
    "Severity", "TensorCheck", "findings_from", "names", "remedy",
]  # fmt: skip

REFUSES = "llama.cpp refuses to load the file"
ABORTS = "llama.cpp aborts the process"

# error: the file does not load, aborts the process, computes something else or never stops;
# warning: it works, but worse or only in some programs; note: it is only unusual.
Severity = Literal["error", "warning", "note"]

# The most a type usually loses, relative to the weights' norm. Measured on normal, Laplace and
# Student-t(3) weights with and without importance, plus a fifth; heavier tails lose more.
USUAL_ERROR = {
    "F16": 0.001, "BF16": 0.003, "Q8_0": 0.011, "Q6_K": 0.04, "Q5_K": 0.065, "Q5_1": 0.065,
    "Q5_0": 0.085, "Q4_K": 0.125, "Q4_1": 0.125, "Q4_0": 0.165, "IQ4_NL": 0.135, "IQ4_XS": 0.135,
    "MXFP4": 0.17, "Q3_K": 0.25, "IQ3_S": 0.27, "IQ3_XXS": 0.35, "Q2_K": 0.42, "IQ2_S": 0.51,
    "IQ2_XS": 0.53, "IQ2_XXS": 0.63, "IQ1_M": 0.72, "IQ1_S": 0.79, "NVFP4": 0.17, "Q2_0": 0.88,
    "Q1_0": 0.93, "TQ2_0": 1.0, "TQ1_0": 1.0,
}  # fmt: skip
_ZEROS = (
    "the file is damaged, or was converted with an importance file that lacks them; fetch it, "
    "or convert it again with dots1 convert"
)
_UNRELATED = 0.95  # the error of unrelated weights of any size is 1 or more


@dataclass(frozen=True)
class Finding:
    """Something to know of the file: `message` says what is wrong, its effect and the remedy."""

    check: str
    severity: Severity
    message: str
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class TensorCheck:
    """What reading one tensor showed.

    `bad_blocks` hold a NaN, an infinity or an illegal code; the first of them is in `bad_row` of
    `bad_expert`.
    `error` is ‖W − Ŵ‖ / ‖W‖ against the checkpoint, without padding; `worst_error` is that of the
    worst expert, or of the whole tensor if it has no experts. `changed` weights differ from the
    checkpoint's although the type can hold them exactly; `padding` weights should be zero.
    All weights of the `zero` experts are 0, and not so in the checkpoint; a matrix without experts
    is expert 0.
    """

    name: str
    role: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    bad_blocks: int = 0
    bad_expert: int = 0
    bad_row: int = 0
    error: float | None = None
    worst_error: float | None = None
    worst_expert: int = 0
    changed: int = 0
    padding: int = 0
    zero: tuple[int, ...] = ()

    @property
    def is_zero(self) -> bool:
        return len(self.zero) == (self.shape[0] if len(self.shape) == 3 else 1)


@dataclass(frozen=True)
class Report:
    """All that is known of a file; `tensors` is empty if blocks were not checked."""

    files: tuple[Path, ...]
    n_tensors: int
    nbytes: int
    against: Path | None
    findings: tuple[Finding, ...]
    tensors: tuple[TensorCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no finding of severity "error"."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def changes(self) -> tuple[Change, ...]:
        """The changes of all findings, one for each key."""
        every = (change for finding in self.findings for change in finding.changes)
        return tuple({change.key: change for change in every}.values())

    def worst(self, count: int = 10) -> list[TensorCheck]:
        """The tensors with the largest relative errors; exact tensors are left out."""
        return sorted((t for t in self.tensors if t.error), key=_error, reverse=True)[:count]


def _error(tensor: TensorCheck) -> float:
    error = tensor.error or 0.0
    return math.inf if math.isnan(error) else error


def names(items: Iterable[str]) -> str:
    """`a, b, c and 58 more`."""
    every = list(items)
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")


def remedy(changes: Sequence[Change], by_fix: str) -> str:
    """What a person can do: `by_fix` says what --fix does if `changes` put it right."""
    if changes:
        return by_fix
    return "compare with --against the checkpoint, or convert it again with dots1 convert"


def findings_from(tensors: Sequence[TensorCheck]) -> Iterator[Finding]:
    """The findings about tensors that were read, and compared if there was a checkpoint."""
    compared = [tensor for tensor in tensors if tensor.worst_error is not None]
    other = [t for t in compared if not _worst(t) < _most(t.type)]  # includes NaN
    changed = [tensor for tensor in compared if tensor.changed and tensor not in other]
    padded = [tensor for tensor in compared if tensor.padding]
    unusual = [
        tensor for tensor in compared
        if USUAL_ERROR.get(tensor.type, 1.0) < _worst(tensor) < _most(tensor.type)
        and not tensor.changed
    ]  # fmt: skip
    if damaged := [tensor for tensor in tensors if tensor.bad_blocks]:
        yield Finding("blocks", "error", _damaged(damaged))
    zero = [tensor for tensor in tensors if tensor.zero]
    if whole := [tensor for tensor in zero if tensor.is_zero]:
        yield Finding("zeros", "error", f"all weights of {_names(whole)} are 0: {_ZEROS}")
    if parts := [tensor for tensor in zero if not tensor.is_zero]:
        experts = names(f"expert {expert} of {t.name}" for t in parts for expert in t.zero)
        yield Finding("zeros", "warning", f"all weights of {experts} are 0: {_ZEROS}")
    if other:
        first = max(other, key=_worst)
        yield Finding(
            "against", "error",
            f"{_names(other)} hold other weights than the checkpoint (relative error "
            f"{_worst(first):.3f}{_of_expert(first)} of {first.name}): it is another model, or its "
            "tensors are mixed up",
        )  # fmt: skip
    if changed:
        first = changed[0]
        yield Finding(
            "against", "error",
            f"{_names(changed)} differ from the checkpoint where they could be equal "
            f"({first.name} in {first.changed} weights that {first.type} holds exactly): the file "
            "is damaged, or was made from another checkpoint",
        )  # fmt: skip
    if padded:
        first = padded[0]
        yield Finding(
            "against", "error",
            f"the padding of {_names(padded)} is not zero ({first.padding} weights of "
            f"{first.name}): the experts compute something else",
        )  # fmt: skip
    if unusual:
        first = max(unusual, key=lambda tensor: _worst(tensor) / USUAL_ERROR[tensor.type])
        yield Finding(
            "against", "note",
            f"{_names(unusual)} lost more than usual: the relative error is "
            f"{_worst(first):.3f}{_of_expert(first)} of {first.name}, and {first.type} seldom "
            f"exceeds {USUAL_ERROR[first.type]}",
        )  # fmt: skip


def _damaged(tensors: Sequence[TensorCheck]) -> str:
    first, count = tensors[0], sum(tensor.bad_blocks for tensor in tensors)
    expert = f"expert {first.bad_expert}, " if len(first.shape) == 3 else ""
    return (
        f"NaN or infinite weights, or illegal codes, in {count} block{'s' * (count != 1)} of "
        f"{_names(tensors)}, first in {expert}row {first.bad_row} of {first.name}: the file is "
        "damaged; fetch or convert it again"
    )


def _names(tensors: Sequence[TensorCheck]) -> str:
    return names(tensor.name for tensor in tensors)


def _worst(tensor: TensorCheck) -> float:
    return tensor.worst_error or 0.0


def _most(kind: str) -> float:
    """The error from which on weights are unrelated."""
    return max(_UNRELATED, USUAL_ERROR.get(kind, 0.0))


def _of_expert(tensor: TensorCheck) -> str:
    return f" in expert {tensor.worst_expert}" if len(tensor.shape) == 3 else ""
