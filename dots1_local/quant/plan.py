"""A quantisation plan: the type every tensor gets. Decided once, read by everything after.

`--tensor-type REGEX=TYPE`: types that a user sets by tensor name, on top of any recipe.

As in stock llama-quantize, the expression is searched for anywhere in the tensor's name, case
does not matter, the first match in the order given wins, and a type that a row does not fit
still falls back.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dots1_local.architecture import Dots1Config, TensorSpec, inventory, padded_width
from dots1_local.errors import UsageError
from dots1_local.files.json_file import unrepeated
from dots1_local.ggml import QuantType, quant_type

__all__ = [
    "Override",
    "PlannedTensor",
    "QuantPlan",
    "load_plan",
    "overridden",
    "parse_override",
    "parse_overrides",
]


_LARGEST = 1 << 26  # bytes of a file; dots.llm1's has 40 thousand


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
            raw: dict[str, Any] = json.loads(text, object_pairs_hook=unrepeated)
            width, file_type = _integer(raw, "expert_width"), _integer(raw, "file_type")
            recipe = raw["recipe"]
            if not (isinstance(recipe, str) and recipe.isprintable()):
                raise ValueError(f"its 'recipe' is {recipe!r:.40}")
            types = {name: _type(name, kind) for name, kind in raw["types"].items()}
            return cls(recipe, width, file_type, types)
        except KeyError as error:
            raise UsageError(f"this is no quantisation plan: it has no {error}") from None
        except (ValueError, RecursionError, TypeError, AttributeError) as error:
            raise UsageError(f"this is no quantisation plan: {error}") from None


def load_plan(path: str | Path) -> QuantPlan:
    """Read a file that `dots1 convert --dry-run --json` wrote and a person may have edited.

    Raises:
        UsageError: missing, too large, or not such a file.
    """
    try:
        if Path(path).stat().st_size > _LARGEST:
            raise UsageError("this is no quantisation plan: too large")
        return QuantPlan.from_json(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"cannot read the plan {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: this is no quantisation plan: not in UTF-8") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _integer(raw: Mapping[str, Any], key: str) -> int:
    value = raw[key]
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError(f"its {key!r} is {value!r:.40}")
    return value


def _type(name: str, kind: Any) -> str:
    try:
        return quant_type(str(kind)).name
    except UsageError as error:
        raise UsageError(f"the plan cannot store {name} so: {error}") from None


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
    """Read several, in the order they are to be tried."""
    return tuple(parse_override(text) for text in texts)


def overridden(name: str, overrides: Sequence[Override]) -> str | None:
    """The type the first matching override gives the tensor called `name`, or None."""
    for override in overrides:
        if override.pattern.search(name):
            return override.type
    return None
