"""A quantisation plan: the type every tensor gets. Decided once, read by everything after."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dots1_local.architecture import Dots1Config, TensorSpec, inventory, padded_width
from dots1_local.errors import UsageError
from dots1_local.quant.types import QuantType, quant_type

__all__ = ["PlannedTensor", "QuantPlan"]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor and the type it will be stored in."""

    spec: TensorSpec
    kind: QuantType

    @property
    def row_bytes(self) -> int:
        return self.kind.row_bytes(self.spec.columns)

    @property
    def nbytes(self) -> int:
        return self.spec.rows * self.row_bytes


@dataclass(frozen=True)
class QuantPlan:
    """Types by GGUF tensor name, and the width routed experts are padded to.

    `file_type` is llama.cpp's id for the mix (`general.file_type`), a label and nothing more.
    """

    recipe: str
    expert_width: int
    file_type: int
    types: Mapping[str, str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "types", MappingProxyType(dict(self.types)))

    def tensors(self, config: Dots1Config) -> tuple[PlannedTensor, ...]:
        """The model's tensors in file order, each with its type.

        Raises:
            UsageError: the plan is for another model: a width or a tensor's type does not fit.
        """
        width = config.moe_intermediate_size
        if self.expert_width not in (width, padded_width(width)):
            raise UsageError(
                f"the plan stores experts {self.expert_width} wide; this model's are {width}, "
                f"or {padded_width(width)} padded"
            )
        specs = inventory(config, self.expert_width)
        if unknown := self.types.keys() - {spec.name for spec in specs}:
            raise UsageError(f"the plan names {min(unknown)}, which this model does not have")
        return tuple(self._planned(spec) for spec in specs)

    def _planned(self, spec: TensorSpec) -> PlannedTensor:
        if spec.role in ("norm", "router") and self.types.get(spec.name, "F32") != "F32":
            raise UsageError(f"the plan makes {spec.name} {self.types[spec.name]}; it must be F32")
        if spec.name not in self.types:
            raise UsageError(f"the plan gives {spec.name} no type; it was made for another model")
        planned = PlannedTensor(spec, quant_type(self.types[spec.name]))
        if not planned.kind.fits(spec.columns):
            raise UsageError(
                f"{planned.kind.name} does not fit {spec.name}: its rows of {spec.columns} are "
                f"no multiple of {planned.kind.block}"
            )
        return planned

    def to_json(self) -> str:
        """A small file that a person can read, edit and hand back."""
        fields = {
            "recipe": self.recipe,
            "expert_width": self.expert_width,
            "file_type": self.file_type,
            "types": dict(self.types),
        }
        return json.dumps(fields, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "QuantPlan":
        """Read what `to_json` wrote.

        Raises:
            UsageError: not such a file.
        """
        try:
            raw: dict[str, Any] = json.loads(text)
            types = {str(name): quant_type(str(kind)).name for name, kind in raw["types"].items()}
            file_type = int(raw["file_type"])
            if not 0 <= file_type < 1 << 31:
                raise ValueError(f"file_type {file_type}")
            return cls(str(raw["recipe"]), int(raw["expert_width"]), file_type, types)
        except KeyError as error:
            raise UsageError(f"this is no quantisation plan: it has no {error}") from None
        except (ValueError, OverflowError, RecursionError, TypeError, AttributeError) as error:
            raise UsageError(f"this is no quantisation plan: {error}") from None
