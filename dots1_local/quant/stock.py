"""The mixes of stock llama-quantize: which type each tensor of a dots1 model gets.

Types and file size are the same as stock's; tests compare with the installed llama.cpp, mix by
mix, at full geometry. The rules are those of llama.cpp (src/llama-quant.cpp) as a table, in which
the first row that matches decides. Rules that cannot apply to a dots1 model are left out: it has
as many key-value heads as query heads, and an output matrix of its own.
"""

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from dots1_local.architecture import TensorSpec
from dots1_local.errors import UsageError
from dots1_local.ggml import TYPES
from dots1_local.quant.plan import Override, override_type

__all__ = [
    "STOCK_MIXES", "fallback", "file_type", "is_quantisable", "needs_importance",
    "require_importance", "stock_mix", "stock_types",
]  # fmt: skip


@dataclass(frozen=True)
class Mix:
    """One file type of llama-quantize; `file_type` is the value of `general.file_type`."""

    name: str
    file_type: int
    default: str

    @property
    def quantised(self) -> bool:
        """Whether the mix goes below 16 bits; only then do the rules apply."""
        return self.default not in ("F32", "F16", "BF16")


# Name, file type and default type. Most of an IQ2_S file is IQ2_XS, also in llama.cpp.
_MIXES = {
    name: Mix(name, file_type, default)
    for name, file_type, default in (
        ("F32", 0, "F32"), ("F16", 1, "F16"), ("BF16", 32, "BF16"), ("Q8_0", 7, "Q8_0"),
        ("Q6_K", 18, "Q6_K"), ("Q5_K_M", 17, "Q5_K"), ("Q5_K_S", 16, "Q5_K"), ("Q5_1", 9, "Q5_1"),
        ("Q5_0", 8, "Q5_0"), ("Q4_K_M", 15, "Q4_K"), ("Q4_K_S", 14, "Q4_K"), ("Q4_1", 3, "Q4_1"),
        ("Q4_0", 2, "Q4_0"), ("IQ4_NL", 25, "IQ4_NL"), ("IQ4_XS", 30, "IQ4_XS"),
        ("MXFP4_MOE", 38, "MXFP4"), ("Q3_K_L", 13, "Q3_K"), ("Q3_K_M", 12, "Q3_K"),
        ("Q3_K_S", 11, "Q3_K"), ("IQ3_M", 27, "IQ3_S"), ("IQ3_S", 26, "IQ3_S"),
        ("IQ3_XS", 22, "IQ3_S"), ("IQ3_XXS", 23, "IQ3_XXS"), ("Q2_K", 10, "Q2_K"),
        ("Q2_K_S", 21, "Q2_K"), ("IQ2_M", 29, "IQ2_S"), ("IQ2_S", 28, "IQ2_XS"),
        ("IQ2_XS", 20, "IQ2_XS"), ("IQ2_XXS", 19, "IQ2_XXS"), ("IQ1_M", 31, "IQ1_M"),
        ("IQ1_S", 24, "IQ1_S"), ("Q2_0", 41, "Q2_0"), ("TQ2_0", 37, "TQ2_0"),
        ("TQ1_0", 36, "TQ1_0"), ("Q1_0", 40, "Q1_0"),
    )
}  # fmt: skip
_ALIASES = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M", "MXFP4": "MXFP4_MOE"}
STOCK_MIXES: dict[str, Mix] = _MIXES | {alias: _MIXES[name] for alias, name in _ALIASES.items()}
"""Every mix by the names llama-quantize accepts and its aliases, and MXFP4 for MXFP4_MOE."""

# Stock refuses to write these without importance, although some encoders could. The embedding and
# the head, which an imatrix does not cover, are exempt.
_NEEDS_IMPORTANCE = {"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"}
_WITHOUT_IMATRIX = ("token_embd.weight", "output.weight")

# The second choice for rows that are not a multiple of the block; if it does not fit either: F16.
_FALLBACK = {
    **dict.fromkeys(_NEEDS_IMPORTANCE | {"IQ3_S", "IQ4_XS"}, "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q2_0", "TQ2_0", "TQ1_0"), "Q4_0"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}
_NO_FALLBACK = ("Q1_0", "NVFP4")  # stock refuses rows that these do not fit
# llama.h has an id for files of this type, although llama-quantize has no mix for it.
_OTHER_FILE_TYPES = {"NVFP4": 39}


def stock_mix(name: str) -> Mix:
    """The mix called `name`, in any case.

    Raises:
        UsageError: there is no such mix; the message lists all mixes.
    """
    try:
        return STOCK_MIXES[name.upper()]
    except KeyError:
        raise UsageError(f"no mix {name!r}; there are {', '.join(STOCK_MIXES)}") from None


def file_type(type_name: str) -> int:
    """The value of `general.file_type` for a file that is mostly of one type."""
    return _OTHER_FILE_TYPES.get(type_name) or stock_mix(type_name).file_type


def stock_types(
    tensors: Sequence[TensorSpec],
    mix: str,
    *,
    n_expert: int,
    has_importance: bool,
    overrides: Sequence[Override] = (),
) -> dict[str, str]:
    """The type that stock llama-quantize gives each tensor of the inventory, by GGUF name.

    `overrides` are its `--tensor-type` options. Stock ignores them in F32, F16 and BF16 files;
    here they apply there too.
    """
    chosen = stock_mix(mix)
    layers = 1 + max(spec.layer for spec in tensors if spec.layer is not None)
    types = dict.fromkeys((spec.name for spec in tensors), "F32")
    counted: Counter[str] = Counter()
    for spec in sorted(filter(is_quantisable, tensors), key=_stock_order):
        choice = override_type(spec.name, overrides)
        if choice is None:  # stock does not count tensors that are overridden
            position = _position(spec, chosen, n_expert, counted)
            choice = _rule_type(spec, chosen, _Case(position, layers, n_expert, has_importance))
        types[spec.name] = fallback(choice, spec)
    return types


def is_quantisable(spec: TensorSpec) -> bool:
    """Whether stock ever stores the tensor in a type other than F32."""
    is_matrix = any(length > 1 for length in spec.shape[:-1])
    return is_matrix and spec.role not in ("norm", "router")


def fallback(type_name: str, spec: TensorSpec) -> str:
    """The type itself if it fits the tensor's rows, otherwise the type that stock uses instead.

    Raises:
        UsageError: the type does not fit, and stock has no other type for it.
    """
    if type_name in _NO_FALLBACK and not TYPES[type_name].fits(spec.columns):
        raise UsageError(
            f"{spec.name} has rows of {spec.columns}, which {type_name}'s blocks of "
            f"{TYPES[type_name].block} do not fit, and llama-quantize has no other type for it; "
            f"choose one with --tensor-type {spec.name}=TYPE"
        )
    for name in (type_name, _FALLBACK.get(type_name, "F16")):
        if TYPES[name].fits(spec.columns):
            return name
    return "F16"


def require_importance(types: Mapping[str, str], covered: Container[str], mix: str = "") -> None:
    """Refuse types that need importance for tensors that are not `covered`, as stock does.

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
    """The number that a rule compares: the layer for some mixes and parts; for the others, how
    many tensors of the part came before."""
    part = _part(spec)
    before = counted[part]
    counted[part] += 1
    by_layer = part.startswith("ffn") and n_expert > 1 and mix.name not in _LOW_MIXES
    return spec.layer if by_layer and spec.layer is not None else before


def _part(spec: TensorSpec) -> str:
    """The tensor's part as the rules name it: `ffn_down_exps` and `ffn_down_shexp` are both
    `ffn_down`."""
    return spec.part.removesuffix("_exps").removesuffix("_shexp")


@dataclass(frozen=True)
class _Case:
    """What a rule may depend on besides mix and part."""

    position: int
    layers: int
    experts: int
    importance: bool


_When = Callable[[_Case], bool]


def _always(case: _Case) -> bool:
    return True


def _mixtral(case: _Case) -> bool:
    # llama.cpp gives every model with exactly 8 experts what was tuned on Mixtral 8x7B.
    return case.experts == 8


def _first(number: int) -> _When:
    return lambda case: case.position < number


def _early(case: _Case) -> bool:
    return case.position < case.layers // 8


def _early_with_importance(case: _Case) -> bool:
    return _early(case) and case.importance


def _early_without_importance(case: _Case) -> bool:
    return _early(case) and not case.importance


def _middle(case: _Case) -> bool:
    return case.layers // 8 <= case.position < 7 * case.layers // 8


def _more_bits(case: _Case) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return not _middle(case) or (case.position - case.layers // 8) % 3 == 2


@dataclass(frozen=True)
class _Rule:
    """In `mixes`, tensors of `part` become `type` where `when` holds.

    `part` is a tensor's part without `_exps` or `_shexp`; "experts" are all the routed ones.
    """

    part: str
    mixes: str
    type: str
    when: _When = _always


_LOW = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M"  # below 3 bits
_LOW_MIXES = tuple(_LOW.split())
_OTHERS = " ".join(name for name in _MIXES if name not in _LOW_MIXES)
_LIKE_MIXTRAL = f"{_LOW} Q2_K IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ4_NL IQ4_XS Q3_K_S Q3_K_M Q4_K_S Q4_K_M"

_RULES = (
    _Rule("output", "MXFP4_MOE Q8_0", "Q8_0"),
    _Rule("output", f"{_LOW} IQ3_XXS", "Q5_K"),
    _Rule("output", _OTHERS, "Q6_K"),
    _Rule("experts", "MXFP4_MOE", "MXFP4"),
    _Rule("any", "MXFP4_MOE", "Q8_0"),
    _Rule("token_embd", "IQ1_S IQ1_M IQ2_XXS IQ2_XS", "Q2_K"),
    _Rule("token_embd", "IQ2_S IQ2_M IQ3_XXS", "IQ3_S"),
    _Rule("token_embd", "Q2_0 TQ2_0 TQ1_0", "Q4_K"),
    _Rule("attn_v", _LOW, "Q4_K", lambda case: case.experts >= 4),
    _Rule("attn_v", "IQ2_S IQ2_M", "IQ3_S"),
    _Rule("attn_v", _LOW, "Q2_K"),
    _Rule("attn_v", _OTHERS, "Q8_0", _mixtral),
    _Rule("attn_v", "Q2_K", "Q3_K"),
    _Rule("attn_v", "IQ3_XXS", "IQ3_S", lambda case: not case.importance),
    _Rule("attn_v", "IQ3_M", "Q4_K"),
    _Rule("attn_v", "Q3_K_M", "Q5_K", _first(2)),
    _Rule("attn_v", "Q3_K_M", "Q4_K"),
    _Rule("attn_v", "Q3_K_L", "Q5_K"),
    _Rule("attn_v", "Q4_K_S", "Q5_K", _first(4)),
    _Rule("attn_v", "Q4_K_M Q5_K_M", "Q6_K", _more_bits),
    _Rule("attn_k", _LOW, "Q4_K", _mixtral),
    _Rule("attn_k", _OTHERS, "Q8_0", _mixtral),
    _Rule("attn_k", "IQ3_XS", "IQ3_XXS"),
    _Rule("attn_k", "IQ3_XXS", "IQ2_S"),
    _Rule("attn_q", "IQ3_XS", "IQ3_XXS"),
    _Rule("attn_q", "IQ3_XXS", "IQ2_S"),
    _Rule("attn_output", _LIKE_MIXTRAL, "Q5_K", _mixtral),
    _Rule("attn_output", "IQ1_S IQ1_M", "IQ2_XXS"),
    _Rule("attn_output", "IQ2_S IQ2_M IQ3_XXS", "IQ3_S"),
    _Rule("attn_output", "Q2_K", "Q3_K"),
    _Rule("attn_output", "Q3_K_M IQ3_M", "Q4_K"),
    _Rule("attn_output", "Q3_K_L", "Q5_K", lambda case: not _mixtral(case)),
    _Rule("ffn_down", "IQ2_S IQ2_M", "IQ3_S", _early),
    _Rule("ffn_down", _LOW, "Q2_K", _early),
    _Rule("ffn_down", "Q2_K", "Q3_K"),
    _Rule("ffn_down", "Q2_K_S", "Q4_K", _early),
    _Rule("ffn_down", "IQ3_XXS", "Q4_K", _early_without_importance),
    _Rule("ffn_down", "IQ3_XXS", "Q3_K", lambda case: not case.importance),
    _Rule("ffn_down", "IQ3_M", "Q4_K", _early),
    _Rule("ffn_down", "IQ3_M", "Q4_K", lambda case: _mixtral(case) and _more_bits(case)),
    _Rule("ffn_down", "Q3_K_M", "Q5_K", lambda case: case.position < case.layers // 16),
    _Rule("ffn_down", "Q3_K_M", "Q4_K"),
    _Rule("ffn_down", "Q3_K_L", "Q5_K"),
    _Rule("ffn_down", "Q4_K_S", "Q5_K", _early),
    _Rule("ffn_down", "Q4_K_M Q5_K_M", "Q6_K", _more_bits),
    _Rule("ffn_down", "IQ4_NL IQ4_XS", "Q5_K", _early_without_importance),
    _Rule("ffn_down", "Q4_0", "Q4_1", _early_with_importance),
    _Rule("ffn_down", "Q5_0", "Q5_1", _early_with_importance),
    _Rule("ffn_gate ffn_up", "IQ3_XS", "IQ3_XXS", _middle),
)


def _rule_type(spec: TensorSpec, mix: Mix, case: _Case) -> str:
    """The type that the table gives a tensor, before `fallback`."""
    if not mix.quantised:
        return mix.default
    part = _part(spec)
    if part == "output" and not TYPES[mix.default].fits(spec.columns):
        return "Q8_0"
    routed = len(spec.shape) == 3 and spec.shape[0] > 1
    parts = (part, "experts", "any") if routed else (part, "any")
    return next((rule.type for rule in _rules(mix.name, parts) if rule.when(case)), mix.default)


@cache
def _rules(mix: str, parts: tuple[str, ...]) -> tuple[_Rule, ...]:
    return tuple(
        rule
        for rule in _RULES
        if mix in rule.mixes.split() and any(part in parts for part in rule.part.split())
    )
