"""The mixes of stock llama-quantize: which type each tensor of a dots1 model gets.

The same types as stock's, byte for byte the same file size: tests compare with the installed
llama.cpp, mix by mix, at full geometry. The rules themselves are in `stock_rules`.
"""

from collections import Counter
from collections.abc import Container, Mapping, Sequence

from dots1_local.architecture import TensorSpec
from dots1_local.errors import UsageError
from dots1_local.ggml import TYPES
from dots1_local.quant.plan import Override, overridden
from dots1_local.quant.stock_rules import LOW_MIXES, STOCK_MIXES, Case, Mix, part_of, rule_type

__all__ = [
    "STOCK_MIXES",
    "Mix",
    "fallback",
    "is_quantisable",
    "needs_importance",
    "require_importance",
    "stock_mix",
    "stock_types",
]

# What stock refuses to write without importance, although some encoders could. The embedding and
# the head, which an imatrix does not cover, are exempt.
_NEEDS_IMPORTANCE = {"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"}
_WITHOUT_IMATRIX = ("token_embd.weight", "output.weight")

# For rows that are no whole number of blocks; a row that the second choice does not fit is F16.
_FALLBACK = {
    **dict.fromkeys(_NEEDS_IMPORTANCE | {"IQ3_S", "IQ4_XS"}, "IQ4_NL"),
    **{"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}


def stock_mix(name: str) -> Mix:
    """The mix called `name`, in any case.

    Raises:
        UsageError: no such mix; the message lists those there are.
    """
    try:
        return STOCK_MIXES[name.upper()]
    except KeyError:
        raise UsageError(f"no mix {name!r}; there are {', '.join(STOCK_MIXES)}") from None


def stock_types(
    tensors: Sequence[TensorSpec],
    mix: str,
    *,
    n_expert: int,
    has_importance: bool,
    overrides: Sequence[Override] = (),
) -> dict[str, str]:
    """The type stock llama-quantize gives each tensor of the inventory, by GGUF name.

    `overrides` are its `--tensor-type` options. Stock ignores them in F32, F16 and BF16 files;
    here they apply there too.
    """
    chosen = stock_mix(mix)
    layers = 1 + max(spec.layer for spec in tensors if spec.layer is not None)
    types = dict.fromkeys((spec.name for spec in tensors), "F32")
    counted: Counter[str] = Counter()
    for spec in sorted(filter(is_quantisable, tensors), key=_stock_order):
        choice = overridden(spec.name, overrides)
        if choice is None:  # stock does not count tensors that are overridden
            position = _position(spec, chosen, n_expert, counted)
            choice = rule_type(spec, chosen, Case(position, layers, n_expert, has_importance))
        types[spec.name] = fallback(choice, spec.columns)
    return types


def is_quantisable(spec: TensorSpec) -> bool:
    """Whether stock ever stores the tensor in another type than F32."""
    matrix = any(length > 1 for length in spec.shape[:-1])
    return matrix and spec.role not in ("norm", "router")


def fallback(type_name: str, columns: int) -> str:
    """The type itself, or what stock uses instead for rows that are no whole number of blocks."""
    for name in (type_name, _FALLBACK.get(type_name, "F16")):
        if TYPES[name].fits(columns):
            return name
    return "F16"


def require_importance(types: Mapping[str, str], covered: Container[str], mix: str = "") -> None:
    """Refuse what stock refuses: a type too small for a tensor that `covered` does not hold.

    Raises:
        UsageError: names the first such tensor and its type.
    """
    for name, type_name in types.items():
        if name not in covered and needs_importance(name, type_name, mix):
            raise UsageError(
                f"{name} would be {type_name}, which is garbage without importance: "
                "give an imatrix that covers it, or choose a larger type"
            )


def needs_importance(name: str, type_name: str, mix: str = "") -> bool:
    """Whether stock refuses to store the tensor as `type_name` without importance."""
    if name in _WITHOUT_IMATRIX:
        # Stock goes ahead with any type here, and aborts where the encoder itself insists.
        return TYPES[type_name].needs_importance
    return type_name in _NEEDS_IMPORTANCE or (type_name == "Q2_K" and mix.upper() == "Q2_K_S")


def _stock_order(spec: TensorSpec) -> tuple[int, str]:
    return (-1 if spec.layer is None else spec.layer, spec.name)


def _position(spec: TensorSpec, mix: Mix, n_expert: int, counted: Counter[str]) -> int:
    """The layer, or how many tensors of the part came before: stock uses now one, now the other."""
    part = part_of(spec)
    before = counted[part]
    counted[part] += 1
    by_layer = part.startswith("ffn") and n_expert > 1 and mix.name not in LOW_MIXES
    return spec.layer if by_layer and spec.layer is not None else before
