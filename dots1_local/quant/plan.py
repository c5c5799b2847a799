"""A quantisation plan: the type of every tensor, decided before conversion begins.

`--tensor-type REGEX=TYPE` sets types by tensor name, whatever the recipe says. As in stock
llama-quantize, the expression may match anywhere in the name, case is ignored, the first matching
option wins, and a type that does not fit a tensor's rows still falls back.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec

from dots1_local.architecture import Dots1Config, TensorSpec, inventory, padded_width
from dots1_local.errors import UsageError
from dots1_local.files.json_file import JsonError, convert_json, parse_json, read_json
from dots1_local.ggml import QuantType, quant_type

__all__ = [
    "Override", "PlannedTensor", "QuantPlan", "load_plan", "override_type", "parse_override",
    "parse_overrides",
]  # fmt: skip


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
    """Types by GGUF tensor name, and the width that routed experts are padded to.

    `file_type` is llama.cpp's id for the mix (`general.file_type`); it is only a label.
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
            UsageError: the plan is for another model, or a type does not fit a tensor.
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
        if spec.name not in self.types:
            raise UsageError(f"the plan gives {spec.name} no type; it was made for another model")
        kind = quant_type(self.types[spec.name])
        if spec.role in ("norm", "router") and kind.name != "F32":
            raise UsageError(f"the plan stores {spec.name} as {kind.name}; it must be F32")
        if not kind.fits(spec.columns):
            raise UsageError(
                f"{kind.name} does not fit {spec.name}: its rows of {spec.columns} are not a "
                f"multiple of {kind.block}"
            )
        return PlannedTensor(spec, kind)

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
        """Read what `to_json` wrote; other keys are ignored.

        Raises:
            UsageError: the text is not a quantisation plan.
        """
        try:
            return _plan_from(parse_json(text.encode()), "the text")
        except JsonError as error:
            raise UsageError(f"the text is not a quantisation plan: {error}") from None


def load_plan(path: str | Path) -> QuantPlan:
    """Read a file that `dots1 convert --dry-run --json` wrote and a person may have edited.

    Raises:
        UsageError: the file is missing, too large, or not a quantisation plan.
    """
    return _plan_from(read_json(path, "quantisation plan"), str(path))


class _PlanFile(msgspec.Struct, frozen=True):
    recipe: str
    expert_width: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    file_type: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    types: dict[str, Any]


def _plan_from(raw: Any, where: str) -> QuantPlan:
    if isinstance(raw, dict) and raw.get("format") == "dots1-placement":
        raise UsageError(
            f"{where} is a placement plan of dots1 plan; this option needs a quantisation plan, "
            "which dots1 convert --dry-run --json prints"
        )
    try:
        file = convert_json(raw, _PlanFile)
        if not file.recipe.isprintable():
            raise JsonError(f"expected printable text, got {file.recipe!r:.40}", "recipe")
        types = {name: _type_name(name, kind) for name, kind in file.types.items()}
    except JsonError as error:
        raise UsageError(f"{where} is not a quantisation plan: {error}") from None
    return QuantPlan(file.recipe, file.expert_width, file.file_type, types)


def _type_name(tensor: str, kind: Any) -> str:
    try:
        return quant_type(str(kind)).name
    except UsageError as error:
        raise JsonError(str(error), f"types[{tensor!r:.100}]") from None


@dataclass(frozen=True)
class Override:
    """Tensors whose name contains a match of `pattern` are stored as `type`."""

    pattern: re.Pattern[str]
    type: str


def parse_override(text: str) -> Override:
    """Read one `REGEX=TYPE`, split at the first equals sign.

    Raises:
        UsageError: a part is missing, the expression is invalid, or there is no such type.
    """
    expression, _, name = text.partition("=")
    if not expression or not name:
        raise UsageError(f"--tensor-type {text!r} is not of the form REGEX=TYPE")
    try:
        # Stock lower-cases the expression, which would turn \D into \d; ignoring case does not.
        pattern = re.compile(expression, re.IGNORECASE)
    except re.error as error:
        raise UsageError(f"--tensor-type {text!r} has an invalid expression: {error}") from None
    return Override(pattern, quant_type(name).name)


def parse_overrides(texts: Iterable[str]) -> tuple[Override, ...]:
    """Read several options, in the order in which they are tried."""
    return tuple(parse_override(text) for text in texts)


def override_type(name: str, overrides: Sequence[Override]) -> str | None:
    """The type that the first matching override gives the tensor called `name`, or None."""
    return next((o.type for o in overrides if o.pattern.search(name)), None)
