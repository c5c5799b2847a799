"""Measured recipes, with the sizes that they are projected to and the KL divergence predicted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.projection import projected_bytes, projection
from benchmarks.quality_runs import Example, Quality
from dots1_local.architecture import Role
from dots1_local.calibrate.manifest import IMATRIX
from dots1_local.errors import Dots1Error
from dots1_local.quant.allocate import Allocator
from dots1_local.quant.imatrix_file import load_importance
from dots1_local.quant.plan import QuantPlan
from dots1_local.quant.sensitivity import Sensitivity

__all__ = ["Candidate", "allocator", "measured"]


@dataclass(frozen=True)
class Candidate:
    """A measured recipe; `projected` bytes are dots.llm1's, `predicted` its KL divergence."""

    plan: QuantPlan
    projected: dict[Role, float]
    quality: Quality
    predicted: float | None

    @cached_property
    def nbytes(self) -> float:
        """Projected to dots.llm1."""
        return sum(self.projected.values())

    @property
    def kl(self) -> float:
        return self.quality.kl.value


def measured(
    example: Example,
    plans: Sequence[QuantPlan],
    *,
    refine: bool = False,
    calibration: Path | None = None,
) -> list[Candidate]:
    """Measure plans, perhaps refined, with the example's calibration or another folder's."""
    folder = calibration or example.calibrated
    found = example.measure(plans, folder if refine else None)
    sensitivity = example.refined_sensitivity if refine else example.sensitivity
    return [
        Candidate(
            plan, projected_bytes(plan, example.config), quality, _predicted(sensitivity, plan)
        )
        for plan, quality in zip(plans, found, strict=True)
    ]


def allocator(example: Example, *, refine: bool = False) -> Allocator:
    """Choose types for projected sizes, from their sensitivity in plain or in refined files."""
    return Allocator(
        example.config,
        example.refined_sensitivity if refine else example.sensitivity,
        covered=load_importance(example.calibrated / IMATRIX),
        cost=projection(example.config),
    )


def _predicted(sensitivity: Sensitivity, plan: QuantPlan) -> float | None:
    try:
        return sensitivity.predict(plan.types)
    except Dots1Error:  # of a type that only stock uses
        return None
