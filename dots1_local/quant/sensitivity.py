"""How much each tensor's type damages the model, as calibration measured it.

The KL divergence of a plan from the model is predicted as

    KL = sum of damage + sqrt(sum of flips)

over its tensors. The first term holds while the routers choose as they did: noise that one matrix
adds does not depend on another's, and KL divergence is quadratic in it. The second is what comes of
routers that choose otherwise where two experts are nearly tied: the number of those goes with the
noise's size, not with its square.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dots1_local.architecture import Dots1Config
from dots1_local.errors import Dots1Error
from dots1_local.ggml import TYPES

__all__ = ["Effect", "Sensitivity", "geometry", "load_sensitivity"]

_FORMAT = 1
_LARGEST = 1 << 26  # bytes of a file; dots.llm1's has 2 million
_MOST = 1e9  # nats, and then some; sums of it stay finite
# What the tensors' names and shapes follow from.
_GEOMETRY = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts",
    "first_k_dense_replace", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class Effect:
    """What storing one tensor in one type does.

    `error` is the mean square of the change in the tensor's output over the output's own.
    `damage` is in nats a token, `flips` in their square.
    """

    error: float
    damage: float
    flips: float


@dataclass(frozen=True)
class Sensitivity:
    """Effects by GGUF tensor name and type.

    Types whose blocks an unpadded row does not fill were measured on the padded one. `tokens` is
    how many the gradients are from; `imatrix` is the SHA-256 of the importance file that belongs
    to it. `reference_kl` was measured with all matrices in `reference_type`, and sets the scale of
    `flips`; `reference_damage` is the first term's share of it.
    """

    geometry: Mapping[str, int]
    imatrix: str
    tokens: int
    reference_type: str
    reference_kl: float
    reference_damage: float
    tensors: Mapping[str, Mapping[str, Effect]]

    def predict(self, types: Mapping[str, str]) -> float:
        """KL divergence, in nats a token, of a model whose tensors are stored as `types` says.

        Tensors that were not measured (norms, routers), and types of 16 bits and more, are taken
        as exact.
        """
        effects = list(self._effects(types))
        return sum(e.damage for e in effects) + math.sqrt(sum(e.flips for e in effects))

    def _effects(self, types: Mapping[str, str]) -> Iterable[Effect]:
        for name, kind in types.items():
            if name in self.tensors and TYPES[kind].bpw < 16:
                if kind not in self.tensors[name]:
                    raise Dots1Error(f"what {kind} does to {name} was not measured")
                yield self.tensors[name][kind]

    def check(self, config: Dots1Config) -> None:
        """Refuse a file measured on another model.

        Raises:
            Dots1Error: names the first number that differs.
        """
        for key, value in geometry(config).items():
            if self.geometry.get(key) != value:
                raise Dots1Error(
                    f"the sensitivity was measured on another model: its {key} is "
                    f"{self.geometry.get(key)}, this model's {value}"
                )

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Sensitivity":
        """Read what `to_json` wrote.

        Raises:
            ValueError: not such a text.
        """
        raw: Any = json.loads(text)
        if not isinstance(raw, dict) or raw.pop("format", None) != _FORMAT:
            raise ValueError("not of a known format")
        try:
            return cls(
                {str(key): int(value) for key, value in raw["geometry"].items()},
                str(raw["imatrix"]),
                int(raw["tokens"]),
                str(raw["reference_type"]),
                _figure(raw["reference_kl"]),
                _figure(raw["reference_damage"]),
                {str(n): _read_effects(n, by_type) for n, by_type in raw["tensors"].items()},
            )
        except KeyError as error:
            raise ValueError(f"it has no {error}") from None
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(str(error)) from None


def geometry(config: Dots1Config) -> dict[str, int]:
    """The numbers that tell whether a file belongs to a model."""
    return {key: getattr(config, key) for key in _GEOMETRY}


def load_sensitivity(path: str | Path) -> Sensitivity:
    """Read a file that calibration wrote.

    Raises:
        Dots1Error: missing, too large, or not such a file.
    """
    try:
        if Path(path).stat().st_size > _LARGEST:
            raise ValueError("too large")
        return Sensitivity.from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Dots1Error(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Dots1Error(f"{path} is no sensitivity file: {error}") from None


def _read_effects(name: str, by_type: Mapping[str, Any]) -> dict[str, Effect]:
    if unknown := by_type.keys() - TYPES.keys():
        raise ValueError(f"{name} has the unknown type {min(unknown)!r}")
    return {
        kind: Effect(*(_figure(values[key]) for key in ("error", "damage", "flips")))
        for kind, values in by_type.items()
    }


def _figure(value: Any) -> float:
    number = float(value)
    if not 0 <= number <= _MOST:  # nor NaN
        raise ValueError(f"{value!r} is no figure")
    return number
