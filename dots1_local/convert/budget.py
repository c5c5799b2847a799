"""What bounds a file that is to be made: its size, its bits per weight, or its damage.

What the folder of a calibration brings to a conversion.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor, log10
from pathlib import Path
from typing import Literal

from dots1_local.architecture import Dots1Config
from dots1_local.calibrate.folder import IMATRIX, SENSITIVITY
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.quant.allocate import Allocator
from dots1_local.quant.allocation import Allocation
from dots1_local.quant.importance import Importance, load_importance
from dots1_local.quant.plan import QuantPlan
from dots1_local.quant.sensitivity import Sensitivity, load_sensitivity

__all__ = [
    "Budget",
    "load_calibration",
    "predicted_kl",
]


@dataclass(frozen=True)
class Budget:
    """One bound and its value.

    "size" is in bytes of all files, headers and alignment included; "weights" in bytes of the
    tensors alone, and may be more than there is a use for; "bpw" in bits of the tensors per
    parameter of the model; "kld" in nats a token.
    """

    kind: Literal["size", "weights", "bpw", "kld"]
    value: float

    def __post_init__(self) -> None:
        if not 0 < self.value < 1e18:  # nor NaN
            raise UsageError(f"a budget is a number above 0 and below 1e18, not {self.value:g}")

    def __str__(self) -> str:
        if self.kind == "kld":
            return f"KLD {self.value:g}"
        if self.kind == "bpw":
            return f"{self.value:g} bpw"
        return _decimal(self.value) + (" of weights" if self.kind == "weights" else "")

    def allocate(
        self, allocator: Allocator, parameters: int, overhead: Callable[[Allocation | None], int]
    ) -> Allocation:
        """The best plan for a model of so many `parameters` under this budget.

        `overhead` tells the bytes that a file of a plan takes beside its tensors; given None, of
        any plan.

        Raises:
            UsageError: out of reach; the message names what is possible.
        """
        recipe = f"measured {self}"
        if self.kind == "kld":
            return allocator.reaching(self.value, recipe)
        if self.kind == "bpw":
            unit = parameters / 8

            def say(count: float) -> str:
                return f"{_rounded_up(count / unit, 4):.9g} bpw"

            return allocator.within(self.value * unit, recipe, say)
        if self.kind == "weights":
            return allocator.within(min(self.value, allocator.largest), recipe, _decimal)
        extra = overhead(None)
        while True:  # shards change with the plan, and with them the bytes of headers
            allocation = self._beside(allocator, extra, recipe)
            if (found := overhead(allocation)) <= extra:
                return allocation
            extra = found

    def _beside(self, allocator: Allocator, extra: int, recipe: str) -> Allocation:
        return allocator.within(self.value - extra, recipe, lambda n: _decimal(n + extra))


def _decimal(count: float) -> str:
    """48000000000 -> '48 GB', to five digits, rounded up."""
    unit, scale = next(
        ((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= s), ("B", 1.0)
    )
    digits = 4 - floor(log10(max(count / scale, 1)))
    return f"{_rounded_up(count / scale, digits):.9g} {unit}"


def _rounded_up(value: float, digits: int) -> float:
    """To so many digits after the point; what is a number of so few stays that number."""
    return float(ceil(round(value * 10.0**digits, 9)) / 10.0**digits)


def load_calibration(
    folder: Path, imatrix: str | Path | None = None
) -> tuple[Sensitivity, Importance]:
    """The folder's sensitivity, and its importance, or that in the file `imatrix`.

    Raises:
        Dots1Error: there is no such folder, it lacks one, or its two do not belong together.
    """
    if not folder.is_dir():
        raise Dots1Error(f"{folder} is no folder; dots1 calibrate -o {folder} makes it")
    for name in (SENSITIVITY, *([] if imatrix else [IMATRIX])):
        if not (folder / name).is_file():
            raise Dots1Error(f"{folder} has no {name}; dots1 calibrate -o {folder} makes it")
    sensitivity = load_sensitivity(folder / SENSITIVITY)
    importance = load_importance(imatrix or folder / IMATRIX)
    if imatrix is None and importance.sha256 != sensitivity.imatrix:
        raise Dots1Error(
            f"{folder / SENSITIVITY} was measured with another importance file than "
            f"{importance.path} is; calibrate again, or name the file by --imatrix to use it "
            "nevertheless"
        )
    return sensitivity, importance


def predicted_kl(
    folder: Path, config: Dots1Config, plan: QuantPlan, importance: Importance
) -> float | None:
    """What the folder's sensitivity says of a plan; None where it has none or not of its types.

    Raises:
        Dots1Error: it is another model's, or damaged.
    """
    if not (folder / SENSITIVITY).is_file():
        return None
    sensitivity = load_sensitivity(folder / SENSITIVITY)
    sensitivity.check(config)
    if sensitivity.imatrix != importance.sha256:
        return None
    try:
        return sensitivity.predict(plan.types)
    except Dots1Error:  # a type that was not measured
        return None
