"""How much each type of each tensor changes the model's output, as calibration measured it.

The KL divergence of a quantised model from the original is predicted as

    KL = sum of damage + sqrt(sum of flips)

over its tensors. `damage` holds while the routers choose the same experts: the errors of different
matrices are independent, and KL divergence is quadratic in each of them. `flips` is for tokens
whose routers choose other experts because two experts are nearly tied: the number of these tokens
grows with the size of the error, not with its square.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from dots1_local.architecture import Dots1Config
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.json_file import JsonError, convert_json, read_json
from dots1_local.ggml import TYPES

__all__ = ["Effect", "Sensitivity", "check_geometry", "geometry", "load_sensitivity"]

_LARGEST = 1e9  # of every figure in a file, so that sums of them stay finite
# The shapes and names of all tensors follow from these.
_GEOMETRY = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts",
    "first_k_dense_replace", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class Effect:
    """What storing one tensor in one type does.

    `error` is the mean square of the change in the tensor's output, relative to the mean square of
    that output. `damage` is in nats a token, `flips` in nats squared.
    """

    error: float
    damage: float
    flips: float


@dataclass(frozen=True)
class Sensitivity:
    """Effects by GGUF tensor name and type.

    Types whose blocks do not fit an unpadded row were measured on the padded row. `tokens` is the
    number of tokens whose gradients were used; `imatrix` is the SHA-256 of the importance file
    that was measured with it. `reference_kl` is the measured KL divergence with all matrices
    stored as `reference_type`, which sets the scale of `flips`; `reference_damage` is the
    predicted sum of damage of that model.
    """

    geometry: Mapping[str, int]
    imatrix: str
    tokens: int
    reference_type: str
    reference_kl: Annotated[float, msgspec.Meta(ge=0, le=_LARGEST)]
    reference_damage: Annotated[float, msgspec.Meta(ge=0, le=_LARGEST)]
    tensors: Mapping[str, Mapping[str, Effect]]

    def predict(self, types: Mapping[str, str]) -> float:
        """KL divergence, in nats a token, of a model whose tensors are stored as `types` says.

        Tensors that were not measured (norms, routers), and types of 16 bits and more, count as
        exact.

        Raises:
            Dots1Error: a type of a tensor was not measured.
        """
        effects = list(self._effects(types))
        return sum(e.damage for e in effects) + math.sqrt(sum(e.flips for e in effects))

    def _effects(self, types: Mapping[str, str]) -> Iterable[Effect]:
        for name, kind in types.items():
            if name in self.tensors and TYPES[kind].bpw < 16:
                if kind not in self.tensors[name]:
                    raise Dots1Error(f"the effect of {kind} on {name} was not measured")
                yield self.tensors[name][kind]

    def check(self, config: Dots1Config) -> None:
        """Refuse a file measured on another model.

        Raises:
            Dots1Error: names the first number that differs.
        """
        check_geometry("the sensitivity", self.geometry, config)

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"format": 1, **asdict(self)}, indent=1)


def geometry(config: Dots1Config) -> dict[str, int]:
    """The numbers that must agree for a sensitivity file to fit a model."""
    return {key: getattr(config, key) for key in _GEOMETRY}


def check_geometry(what: str, measured: Mapping[str, object], config: Dots1Config) -> None:
    """Refuse what was measured on another model.

    Raises:
        Dots1Error: names the first number that differs.
    """
    for key, value in geometry(config).items():
        if measured.get(key) != value:
            raise Dots1Error(
                f"{what} was measured on another model: its {key} is {measured.get(key)}, this "
                f"model's {value}"
            )


def load_sensitivity(path: str | Path) -> Sensitivity:
    """Read a file that calibration wrote.

    Raises:
        Dots1Error: the file is missing, too large, or not a sensitivity file.
    """
    try:
        raw = read_json(path, "sensitivity file")
        convert_json(raw, _Format)
        found = convert_json(raw, Sensitivity)
    except UsageError as error:  # the file is at fault, not the command
        raise Dots1Error(str(error)) from None
    except JsonError as error:
        raise Dots1Error(f"{path} is not a sensitivity file: {error}") from None
    for name, by_type in found.tensors.items():
        for kind, effect in by_type.items():
            if kind not in TYPES:
                raise Dots1Error(f"{path}: {name} has the unknown type {kind!r}")
            for figure, value in asdict(effect).items():
                if not 0 <= value <= _LARGEST:
                    raise Dots1Error(f"{path}: {name} has the {figure} {value!r} as {kind}")
    return found


class _Format(msgspec.Struct, frozen=True):
    format: Literal[1]
