"""The budget of a conversion, and the calibration that decides how to spend it."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dots1_local.architecture import Dots1Config
from dots1_local.calibrate.manifest import IMATRIX, REFINED_SENSITIVITY, SENSITIVITY
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.quant.allocate import Allocator
from dots1_local.quant.allocation import Allocation
from dots1_local.quant.imatrix_file import load_importance
from dots1_local.quant.importance import Importance
from dots1_local.quant.plan import QuantPlan
from dots1_local.quant.sensitivity import Sensitivity, load_sensitivity
from dots1_local.refine.token_needs import require_tokens

if TYPE_CHECKING:
    from dots1_local.calibrate.refinement_file import RefinementData

__all__ = ["Budget", "load_calibration", "load_refinement", "predicted_kl", "sensitivity_file"]


@dataclass(frozen=True)
class Budget:
    """A limit of one kind.

    "size" is in bytes of all files, with headers and alignment; "weights" in bytes of the tensors
    alone, and may be more than the largest plan takes; "bpw" in bits of the tensors per parameter
    of the model; "kld" is the predicted KL divergence in nats per token.
    """

    kind: Literal["size", "weights", "bpw", "kld"]
    value: float

    def __post_init__(self) -> None:
        if not 0 < self.value < 1e18:  # nor NaN
            raise UsageError(f"a budget must be above 0 and below 1e18, not {self.value:g}")

    def __str__(self) -> str:
        if self.kind == "kld":
            return f"KLD {self.value:g}"
        if self.kind == "bpw":
            return f"{self.value:g} bpw"
        return _decimal(self.value) + (" of weights" if self.kind == "weights" else "")

    def allocate(
        self, allocator: Allocator, parameters: int, overhead: Callable[[Allocation], int]
    ) -> Allocation:
        """Return the best plan within this budget for a model of so many `parameters`.

        `overhead` returns the bytes that a file takes beside its tensors.

        Raises:
            UsageError: the budget cannot be met; the message names what is possible.
        """
        recipe = f"measured {self}"
        if self.kind == "kld":
            return allocator.reaching(self.value, recipe)
        if self.kind == "bpw":
            unit = parameters / 8
            return allocator.within(
                self.value * unit, recipe, lambda n: f"{_rounded_up(n / unit, 4):.9g} bpw"
            )
        if self.kind == "weights":
            return allocator.within(min(self.value, allocator.largest), recipe, _decimal)
        extra = overhead(allocator.reaching(allocator.least_kl, recipe))
        while True:  # the plan decides the shards, and these the bytes of headers
            allocation = self._beside(allocator, extra, recipe)
            if (found := overhead(allocation)) <= extra:
                return allocation
            extra = found

    def _beside(self, allocator: Allocator, extra: int, recipe: str) -> Allocation:
        return allocator.within(self.value - extra, recipe, lambda n: _decimal(n + extra))


def _decimal(count: float) -> str:
    """Format bytes as '48 GB', to five digits, rounded up."""
    unit, scale = next(
        ((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= s), ("B", 1.0)
    )
    digits = 4 - floor(log10(max(count / scale, 1)))
    return f"{_rounded_up(count / scale, digits):.9g} {unit}"


def _rounded_up(value: float, digits: int) -> float:
    """Round up to so many digits after the point; a number that has no more stays as it is."""
    return float(ceil(round(value * 10.0**digits, 9)) / 10.0**digits)


def load_calibration(
    folder: Path, imatrix: str | Path | None = None, *, refine: bool = False
) -> tuple[Sensitivity, Importance]:
    """Load the folder's sensitivity, and its importance or that in the file `imatrix`.

    With `refine` it is the sensitivity to refined types.

    Raises:
        Dots1Error: the folder or one of its files is missing, or they do not belong together.
    """
    if not folder.is_dir():
        raise Dots1Error(f"there is no folder {folder}; make it with dots1 calibrate -o {folder}")
    measured = sensitivity_file(refine)
    for name in (measured, *([] if imatrix else [IMATRIX])):
        if not (folder / name).is_file():
            option = " --refine" if refine else ""
            raise Dots1Error(
                f"{folder} has no {name}; make it with dots1 calibrate{option} -o {folder}"
            )
    sensitivity = load_sensitivity(folder / measured)
    importance = load_importance(imatrix or folder / IMATRIX)
    if imatrix is None and importance.sha256 != sensitivity.imatrix:
        raise Dots1Error(
            f"{folder / measured} was measured with another importance file than "
            f"{importance.path}; calibrate again, or name the file with --imatrix to use it anyway"
        )
    return sensitivity, importance.filled()


def predicted_kl(
    folder: Path,
    config: Dots1Config,
    plan: QuantPlan,
    importance: Importance,
    *,
    refine: bool = False,
) -> float | None:
    """Predict a plan's KL divergence in nats per token from the folder's sensitivity.

    With `refine` it is the sensitivity to refined types. The result is None if the folder has no
    sensitivity for this importance, or if a type was not measured.

    Raises:
        Dots1Error: the sensitivity file is damaged or belongs to another model.
    """
    path = folder / sensitivity_file(refine)
    if not path.is_file():
        return None
    sensitivity = load_sensitivity(path)
    sensitivity.check(config)
    if sensitivity.imatrix != importance.sha256:
        return None
    try:
        return sensitivity.predict(plan.types)
    except Dots1Error:  # a type that was not measured
        return None


def load_refinement(folder: Path, checkpoint: Checkpoint) -> "RefinementData":
    """Open what calibration measured for refinement.

    Raises:
        Dots1Error: see `RefinementData.load`.
        UsageError: the calibration had too few tokens.
    """
    from dots1_local.calibrate.refinement_file import RefinementData  # imports safetensors

    data = RefinementData.load(folder, checkpoint)
    require_tokens(checkpoint.config, data.tokens.size)
    return data


def sensitivity_file(refine: bool) -> str:
    """Return the name of the file with the effects of types, refined or not."""
    return REFINED_SENSITIVITY if refine else SENSITIVITY
