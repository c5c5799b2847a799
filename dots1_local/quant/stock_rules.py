"""The rules of stock llama-quantize for dots1, as a table: the first row that matches decides.

They are llama.cpp's (src/llama-quant.cpp) less what cannot happen in a dots1 model: it has as
many key-value heads as query heads, and an output matrix of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from dots1_local.architecture import TensorSpec
from dots1_local.ggml import TYPES

__all__ = ["LOW_MIXES", "STOCK_MIXES", "Case", "Mix", "part_of", "rule_type"]


@dataclass(frozen=True)
class Mix:
    """One file type of llama-quantize; `file_type` is the value of `general.file_type`."""

    name: str
    file_type: int
    default: str

    @property
    def quantised(self) -> bool:
        """Whether the mix goes below 16 bits; the rules apply to those only."""
        return self.default not in ("F32", "F16", "BF16")


_MIXES = {
    mix.name: mix
    for mix in (
        Mix("F32", 0, "F32"),
        Mix("F16", 1, "F16"),
        Mix("BF16", 32, "BF16"),
        Mix("Q8_0", 7, "Q8_0"),
        Mix("Q6_K", 18, "Q6_K"),
        Mix("Q5_K_M", 17, "Q5_K"),
        Mix("Q5_K_S", 16, "Q5_K"),
        Mix("Q5_1", 9, "Q5_1"),
        Mix("Q5_0", 8, "Q5_0"),
        Mix("Q4_K_M", 15, "Q4_K"),
        Mix("Q4_K_S", 14, "Q4_K"),
        Mix("Q4_1", 3, "Q4_1"),
        Mix("Q4_0", 2, "Q4_0"),
        Mix("IQ4_NL", 25, "IQ4_NL"),
        Mix("IQ4_XS", 30, "IQ4_XS"),
        Mix("MXFP4_MOE", 38, "MXFP4"),
        Mix("Q3_K_L", 13, "Q3_K"),
        Mix("Q3_K_M", 12, "Q3_K"),
        Mix("Q3_K_S", 11, "Q3_K"),
        Mix("IQ3_M", 27, "IQ3_S"),
        Mix("IQ3_S", 26, "IQ3_S"),
        Mix("IQ3_XS", 22, "IQ3_S"),
        Mix("IQ3_XXS", 23, "IQ3_XXS"),
        Mix("Q2_K", 10, "Q2_K"),
        Mix("Q2_K_S", 21, "Q2_K"),
        Mix("IQ2_M", 29, "IQ2_S"),
        Mix("IQ2_S", 28, "IQ2_XS"),  # sic: most of an IQ2_S file is IQ2_XS
        Mix("IQ2_XS", 20, "IQ2_XS"),
        Mix("IQ2_XXS", 19, "IQ2_XXS"),
        Mix("IQ1_M", 31, "IQ1_M"),
        Mix("IQ1_S", 24, "IQ1_S"),
    )
}
_ALIASES = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M", "MXFP4": "MXFP4_MOE"}
STOCK_MIXES: dict[str, Mix] = _MIXES | {alias: _MIXES[name] for alias, name in _ALIASES.items()}
"""Every mix by the names llama-quantize accepts and its aliases, and MXFP4 for MXFP4_MOE."""


@dataclass(frozen=True)
class Case:
    """What a rule may depend on besides mix and part: place in the model, experts, importance."""

    position: int
    layers: int
    experts: int
    importance: bool


_When = Callable[[Case], bool]


def _always(case: Case) -> bool:
    return True


def _mixtral(case: Case) -> bool:
    # llama.cpp gives every model with exactly 8 experts what was tuned on Mixtral 8x7B.
    return case.experts == 8


def _before(place: Callable[[int], int], importance: bool | None = None) -> _When:
    def when(case: Case) -> bool:
        return case.position < place(case.layers) and importance in (None, case.importance)

    return when


def _more_bits(case: Case) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth, last = case.layers // 8, 7 * case.layers // 8
    return not eighth <= case.position < last or (case.position - eighth) % 3 == 2


def _middle(case: Case) -> bool:
    return case.layers // 8 <= case.position < 7 * case.layers // 8


def _eighth(layers: int) -> int:
    return layers // 8


@dataclass(frozen=True)
class _Rule:
    """In `mixes`, tensors of `part` become `type` where `when` holds.

    `part` is a tensor's part without `_exps` or `_shexp`; "experts" are all the routed ones.
    """

    part: str
    mixes: str
    type: str
    when: _When = _always


_LOW = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M"
LOW_MIXES = tuple(_LOW.split())
"""Mixes below 3 bits, which count tensors where the others look at the layer."""
_OTHERS = " ".join(name for name in _MIXES if name not in LOW_MIXES)
_LIKE_MIXTRAL = f"{_LOW} Q2_K IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ4_NL IQ4_XS Q3_K_S Q3_K_M Q4_K_S Q4_K_M"

_RULES = (
    _Rule("output", "MXFP4_MOE Q8_0", "Q8_0"),
    _Rule("output", f"{_LOW} IQ3_XXS", "Q5_K"),
    _Rule("output", _OTHERS, "Q6_K"),
    _Rule("experts", "MXFP4_MOE", "MXFP4"),
    _Rule("any", "MXFP4_MOE", "Q8_0"),
    _Rule("token_embd", "IQ1_S IQ1_M IQ2_XXS IQ2_XS", "Q2_K"),
    _Rule("token_embd", "IQ2_S IQ2_M IQ3_XXS", "IQ3_S"),
    _Rule("attn_v", _LOW, "Q4_K", lambda case: case.experts >= 4),
    _Rule("attn_v", "IQ2_S IQ2_M", "IQ3_S"),
    _Rule("attn_v", _LOW, "Q2_K"),
    _Rule("attn_v", _OTHERS, "Q8_0", _mixtral),
    _Rule("attn_v", "Q2_K", "Q3_K"),
    _Rule("attn_v", "IQ3_XXS", "IQ3_S", lambda case: not case.importance),
    _Rule("attn_v", "IQ3_M", "Q4_K"),
    _Rule("attn_v", "Q3_K_M", "Q5_K", _before(lambda layers: 2)),
    _Rule("attn_v", "Q3_K_M", "Q4_K"),
    _Rule("attn_v", "Q3_K_L", "Q5_K"),
    _Rule("attn_v", "Q4_K_S", "Q5_K", _before(lambda layers: 4)),
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
    _Rule("ffn_down", "IQ2_S IQ2_M", "IQ3_S", _before(_eighth)),
    _Rule("ffn_down", _LOW, "Q2_K", _before(_eighth)),
    _Rule("ffn_down", "Q2_K", "Q3_K"),
    _Rule("ffn_down", "Q2_K_S", "Q4_K", _before(_eighth)),
    _Rule("ffn_down", "IQ3_XXS", "Q4_K", _before(_eighth, importance=False)),
    _Rule("ffn_down", "IQ3_XXS", "Q3_K", lambda case: not case.importance),
    _Rule("ffn_down", "IQ3_M", "Q4_K", _before(_eighth)),
    _Rule("ffn_down", "IQ3_M", "Q4_K", lambda case: _mixtral(case) and _more_bits(case)),
    _Rule("ffn_down", "Q3_K_M", "Q5_K", _before(lambda layers: layers // 16)),
    _Rule("ffn_down", "Q3_K_M", "Q4_K"),
    _Rule("ffn_down", "Q3_K_L", "Q5_K"),
    _Rule("ffn_down", "Q4_K_S", "Q5_K", _before(_eighth)),
    _Rule("ffn_down", "Q4_K_M Q5_K_M", "Q6_K", _more_bits),
    _Rule("ffn_down", "IQ4_NL IQ4_XS", "Q5_K", _before(_eighth, importance=False)),
    _Rule("ffn_down", "Q4_0", "Q4_1", _before(_eighth, importance=True)),
    _Rule("ffn_down", "Q5_0", "Q5_1", _before(_eighth, importance=True)),
    _Rule("ffn_gate ffn_up", "IQ3_XS", "IQ3_XXS", _middle),
)


def rule_type(spec: TensorSpec, mix: Mix, case: Case) -> str:
    """The type the table gives a tensor, before anything falls back."""
    if not mix.quantised:
        return mix.default
    part = part_of(spec)
    if part == "output" and not TYPES[mix.default].fits(spec.columns):
        return "Q8_0"
    routed = len(spec.shape) == 3 and spec.shape[0] > 1
    parts = (part, "experts", "any") if routed else (part, "any")
    for rule in _rules(mix.name, parts):
        if rule.when(case):
            return rule.type
    return mix.default


@cache
def _rules(mix: str, parts: tuple[str, ...]) -> tuple[_Rule, ...]:
    return tuple(
        rule
        for rule in _RULES
        if mix in rule.mixes.split() and any(part in parts for part in rule.part.split())
    )


def part_of(spec: TensorSpec) -> str:
    """`ffn_down_exps` and `ffn_down_shexp` are both `ffn_down` to the rules."""
    return spec.part.removesuffix("_exps").removesuffix("_shexp")
