"""What verifying a file comes to: findings, the keys that would put them right, and errors."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dots1_local.gguf_header import Value

__all__ = [
    "ABORTS", "REFUSES", "Change", "Finding", "Kind", "Report", "Severity", "TensorCheck", "names",
]  # fmt: skip

REFUSES = "llama.cpp refuses to load the file"
ABORTS = "llama.cpp aborts the process"

# error: the file does not load, aborts the process, computes something else or never stops;
# warning: it works, but worse or only in some programs; note: unusual, and no more.
Severity = Literal["error", "warning", "note"]
Kind = Literal["u32", "f32", "bool", "string", "i32[]", "string[]"]


@dataclass(frozen=True)
class Change:
    """Set a key to a value of a kind; without a value, remove it."""

    key: str
    kind: Kind = "u32"
    value: Value | None = None


@dataclass(frozen=True)
class Finding:
    """Something to know of the file: `message` says what is wrong, its effect and the remedy."""

    check: str
    severity: Severity
    message: str
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class TensorCheck:
    """What reading one tensor came to.

    `bad_blocks` do not decode to finite numbers, the first of them in `bad_row` of `bad_expert`.
    `error` is ‖W − Ŵ‖ / ‖W‖ against the checkpoint, without padding, and `worst_error` that of the
    worst expert (of the whole tensor where there is but one); `changed` weights are not the
    checkpoint's though the type could hold them, `padding` ones are not zero though they should.
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


@dataclass(frozen=True)
class Report:
    """All that is known of a file; `tensors` is empty where blocks were not looked at."""

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
        """The keys that put right what keys can put right, each once."""
        every = (change for finding in self.findings for change in finding.changes)
        return tuple({change.key: change for change in every}.values())

    def worst(self, count: int = 10) -> list[TensorCheck]:
        """The tensors with the largest relative error, those without any left out."""
        return sorted((t for t in self.tensors if t.error), key=_error, reverse=True)[:count]


def _error(tensor: TensorCheck) -> float:
    error = tensor.error or 0.0
    return math.inf if math.isnan(error) else error


def names(items: Iterable[str], shown: int = 3) -> str:
    """`a, b, c and 58 more`."""
    every = list(items)
    rest = f" and {len(every) - shown} more" if len(every) > shown else ""
    return ", ".join(every[:shown]) + rest
