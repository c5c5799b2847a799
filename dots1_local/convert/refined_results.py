"""What refinement did to each matrix, kept in a file until the conversion is complete."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dots1_local.files.json_file import JsonError, convert_json, parse_json
from dots1_local.quant.plan import PlannedTensor

__all__ = [
    "MatrixResult",
    "PartResult",
    "TensorResult",
    "append_result",
    "by_part",
    "load_results",
]


class MatrixResult(msgspec.Struct, frozen=True, array_like=True):
    """What became of one matrix, or of some of its rows.

    `kept` says that it has the bytes of ggml's encoder. The ratios are the error after refinement
    by that before: `fitted` in the metric it was fitted to, `held_out` on rows that the metric does
    not know, None if there are none.
    """

    rows: int
    kept: bool
    fitted: float
    held_out: float | None


class TensorResult(msgspec.Struct, frozen=True):
    """The matrices of a tensor: its experts, or pieces of its rows."""

    tensor: str
    matrices: tuple[MatrixResult, ...]


@dataclass(frozen=True)
class PartResult:
    """The matrices of the tensors of one part in all layers; ratios are means over their rows."""

    role: str
    part: str
    matrices: int
    refined: int
    fitted: float
    held_out: float | None


def append_result(path: Path, result: TensorResult) -> None:
    """Add a tensor to a file of results; raise an OSError if the disk is full."""
    with path.open("ab") as file:
        file.write(msgspec.json.encode(result) + b"\n")


def load_results(path: Path) -> dict[str, TensorResult]:
    """Read a file of results by tensor; a line that a kill left incomplete counts as missing."""
    found: dict[str, TensorResult] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            result = convert_json(parse_json(line), TensorResult)
        except JsonError:
            continue
        found[result.tensor] = result
    return found


def by_part(
    tensors: Iterable[PlannedTensor], results: Iterable[TensorResult]
) -> tuple[PartResult, ...]:
    """Sum up results by role and part, in the order of `tensors`."""
    found = {result.tensor: result.matrices for result in results}
    parts: dict[tuple[str, str], list[MatrixResult]] = {}
    for tensor in tensors:
        if tensor.spec.name in found:
            key = (tensor.spec.role, tensor.spec.part)
            parts.setdefault(key, []).extend(found[tensor.spec.name])
    return tuple(_summed(*key, matrices) for key, matrices in parts.items())


def _summed(role: str, part: str, matrices: Sequence[MatrixResult]) -> PartResult:
    judged = [(each.rows, each.held_out) for each in matrices if each.held_out is not None]
    return PartResult(
        role,
        part,
        len(matrices),
        sum(not each.kept for each in matrices),
        _mean([(each.rows, each.fitted) for each in matrices]),
        _mean(judged) if judged else None,
    )


def _mean(values: Sequence[tuple[int, float]]) -> float:
    return math.fsum(rows * value for rows, value in values) / sum(rows for rows, _ in values)
