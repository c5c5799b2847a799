"""The mixes of stock llama-quantize: which type each tensor of a dots1 model gets.

The rules are llama.cpp's (src/llama-quant.cpp) with everything that cannot happen in a dots1
model left out, written as tables: the first row that matches a tensor decides. Tests compare
the result with the installed llama.cpp, mix by mix, at full geometry.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

from dots1_local.architecture import TensorSpec
from dots1_local.errors import UsageError
from dots1_local.quant.overrides import Override, overridden
from dots1_local.quant.types import TYPES

__all__ = ["STOCK_MIXES", "Mix", "require_importance", "stock_mix", "stock_types"]


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
_ALIASES = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}
STOCK_MIXES: dict[str, Mix] = _MIXES | {alias: _MIXES[name] for alias, name in _ALIASES.items()}
"""Every mix by the names llama-quantize accepts, the three aliases included."""

# What stock refuses to write without importance, whatever the mix; the embedding and the head,
# which no imatrix covers, are exempt.
_NEEDS_IMPORTANCE = {"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"}
_WITHOUT_IMATRIX = ("token_embd.weight", "output.weight")

# Where a row is no whole number of blocks; a row that the second choice does not fit is F16.
_FALLBACK = {
    **dict.fromkeys(_NEEDS_IMPORTANCE | {"IQ3_S", "IQ4_XS"}, "IQ4_NL"),
    **{"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}


@dataclass(frozen=True)
class _Case:
    """What a row of the table may depend on; `position` is mostly the layer, of `count`."""

    position: int
    count: int
    experts: int
    importance: bool


_When = Callable[[_Case], bool]


def _always(_: _Case) -> bool:
    return True


def _mixtral(case: _Case) -> bool:
    # llama.cpp gives any model with exactly 8 experts what was tuned for Mixtral 8x7B.
    return case.experts == 8


def _moe(case: _Case) -> bool:
    return case.experts >= 4


def _first_eighth(case: _Case) -> bool:
    return case.position < case.count // 8


def _outer_eighths_and_every_third(case: _Case) -> bool:
    eighth = case.count // 8
    late = case.position >= 7 * case.count // 8
    # The remainder is taken only past the first eighth, where it is C's and Python's alike.
    return case.position < eighth or late or (case.position - eighth) % 3 == 2


def _middle(case: _Case) -> bool:
    return case.count // 8 <= case.position < 7 * case.count // 8


@dataclass(frozen=True)
class _Rule:
    """In `mixes`, tensors called `part` (see `_part`) become `type` where `when` holds."""

    part: str
    mixes: str
    type: str
    when: _When = _always


_LOW = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M"
_IQ2_HIGH = "IQ2_S IQ2_M"
_NOT_LOW = " ".join(name for name in _MIXES if name not in _LOW.split())
_MIXTRAL_OUTPUT = "Q2_K IQ3_XS IQ3_XXS Q3_K_S Q3_K_M IQ4_NL Q4_K_S Q4_K_M IQ3_S IQ3_M IQ4_XS"

_RULES = (
    _Rule("output", "MXFP4_MOE Q8_0", "Q8_0"),
    _Rule("output", f"{_LOW} IQ3_XXS", "Q5_K"),
    _Rule("output", _NOT_LOW, "Q6_K"),
    _Rule("experts", "MXFP4_MOE", "MXFP4"),
    _Rule("*", "MXFP4_MOE", "Q8_0"),
    _Rule("token_embd", "IQ1_S IQ1_M IQ2_XXS IQ2_XS", "Q2_K"),
    _Rule("token_embd", f"{_IQ2_HIGH} IQ3_XXS", "IQ3_S"),
    _Rule("attn_v", _LOW, "Q4_K", _moe),
    _Rule("attn_v", _IQ2_HIGH, "IQ3_S"),
    _Rule("attn_v", _LOW, "Q2_K"),
    _Rule("attn_v", _NOT_LOW, "Q8_0", _mixtral),
    _Rule("attn_v", "Q2_K", "Q3_K"),
    _Rule("attn_v", "IQ3_XXS", "IQ3_S", lambda case: not case.importance),
    _Rule("attn_v", "IQ3_M", "Q4_K"),
    _Rule("attn_v", "Q3_K_M", "Q5_K", lambda case: case.position < 2),
    _Rule("attn_v", "Q3_K_M", "Q4_K"),
    _Rule("attn_v", "Q3_K_L", "Q5_K"),
    _Rule("attn_v", "Q4_K_S", "Q5_K", lambda case: case.position < 4),
    _Rule("attn_v", "Q4_K_M Q5_K_M", "Q6_K", _outer_eighths_and_every_third),
    _Rule("attn_k", _LOW, "Q4_K", _mixtral),
    _Rule("attn_k", _NOT_LOW, "Q8_0", _mixtral),
    _Rule("attn_k", "IQ3_XS", "IQ3_XXS"),
    _Rule("attn_k", "IQ3_XXS", "IQ2_S"),
    _Rule("attn_q", "IQ3_XS", "IQ3_XXS"),
    _Rule("attn_q", "IQ3_XXS", "IQ2_S"),
    _Rule("attn_output", f"{_LOW} {_MIXTRAL_OUTPUT}", "Q5_K", _mixtral),
    _Rule("attn_output", "IQ1_S IQ1_M", "IQ2_XXS", lambda case: not _mixtral(case)),
    _Rule("attn_output", f"{_IQ2_HIGH} IQ3_XXS", "IQ3_S", lambda case: not _mixtral(case)),
    _Rule("attn_output", "Q2_K", "Q3_K", lambda case: not _mixtral(case)),
    _Rule("attn_output", "Q3_K_M IQ3_M", "Q4_K", lambda case: not _mixtral(case)),
    _Rule("attn_output", "Q3_K_L", "Q5_K", lambda case: not _mixtral(case)),
    _Rule("ffn_down", _IQ2_HIGH, "IQ3_S", _first_eighth),
    _Rule("ffn_down", _LOW, "Q2_K", _first_eighth),
    _Rule("ffn_down", "Q2_K", "Q3_K"),
    _Rule("ffn_down", "Q2_K_S", "Q4_K", _first_eighth),
    _Rule("ffn_down", "IQ3_XXS", "Q4_K", lambda case: not case.importance and _first_eighth(case)),
    _Rule("ffn_down", "IQ3_XXS", "Q3_K", lambda case: not case.importance),
    _Rule("ffn_down", "Q3_K_M", "Q5_K", lambda case: case.position < case.count // 16),
    _Rule("ffn_down", "Q3_K_M", "Q4_K"),
    _Rule("ffn_down", "IQ3_M", "Q4_K", _first_eighth),
    _Rule(
        "ffn_down", "IQ3_M", "Q4_K",
        lambda case: _mixtral(case) and _outer_eighths_and_every_third(case),
    ),
    _Rule("ffn_down", "Q3_K_L", "Q5_K"),
    _Rule("ffn_down", "Q4_K_M Q5_K_M", "Q6_K", _outer_eighths_and_every_third),
    _Rule("ffn_down", "Q4_K_S", "Q5_K", _first_eighth),
    _Rule("ffn_down", "IQ4_NL IQ4_XS", "Q5_K", lambda case: not case.importance and _first_eighth(case)),
    _Rule("ffn_down", "Q4_0", "Q4_1", lambda case: case.importance and _first_eighth(case)),
    _Rule("ffn_down", "Q5_0", "Q5_1", lambda case: case.importance and _first_eighth(case)),
    _Rule("ffn_gate", "IQ3_XS", "IQ3_XXS", _middle),
    _Rule("ffn_up", "IQ3_XS", "IQ3_XXS", _middle),
)
