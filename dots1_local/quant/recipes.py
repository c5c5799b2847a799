"""Recipes: a named rule that gives every tensor a type.

A recipe is a stock mix (what llama-quantize writes) or one of our *dynamic* mixes. These store the
tensors that every token uses in large types and routed experts in small ones; the experts' down
projections, whose errors matter most, are one step larger than gate and up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dots1_local.architecture import Dots1Config, TensorSpec, inventory, padded_width
from dots1_local.errors import UsageError
from dots1_local.ggml import TYPES
from dots1_local.quant.plan import Override, QuantPlan, override_type
from dots1_local.quant.stock import STOCK_MIXES, fallback, is_quantisable, stock_mix, stock_types

__all__ = ["Padding", "expert_widths", "make_plan", "recipe_names"]

Padding = Literal["off", "on", "auto"]


@dataclass(frozen=True)
class DynamicMix:
    """Types by role. `down` is for rows that are a multiple of 256, `narrow_down` for others.

    `always` is for attention, shared experts and the dense layer; `vocabulary` for head and
    embedding.
    """

    always: str
    vocabulary: str
    gate_up: str
    down: str
    narrow_down: str
    stock_relative: str  # the stock mix whose `general.file_type` this mix gets
    low: bool = False  # padding may pay: `down` takes less than the 4.5 bits of `narrow_down`

    def type_of(self, spec: TensorSpec) -> str:
        """The type for one quantisable tensor; a type that fits if the mix's own does not."""
        if spec.role in ("embedding", "head"):
            choice, narrow = self.vocabulary, "Q8_0"
        elif spec.role != "routed":
            choice, narrow = self.always, "Q8_0"
        elif spec.part == "ffn_down_exps":
            choice, narrow = self.down, self.narrow_down
        else:
            choice, narrow = self.gate_up, "IQ4_NL"
        return next((t for t in (choice, narrow, "F16") if TYPES[t].fits(spec.columns)), "F32")


DYNAMIC_MIXES: dict[str, DynamicMix] = {
    "DQ2": DynamicMix("Q6_K", "Q6_K", "IQ2_XXS", "IQ3_XXS", "IQ4_NL", "IQ2_XXS", low=True),
    "DQ3": DynamicMix("Q8_0", "Q6_K", "IQ3_XXS", "Q4_K", "IQ4_NL", "IQ3_XXS"),
    "DQ4": DynamicMix("Q8_0", "Q6_K", "Q4_K", "Q5_K", "Q5_0", "Q4_K_M"),
    "DQ5": DynamicMix("Q8_0", "Q8_0", "Q5_K", "Q6_K", "Q5_1", "Q5_K_M"),
    "DQ6": DynamicMix("Q8_0", "Q8_0", "Q6_K", "Q8_0", "Q8_0", "Q6_K"),
}

# Used without an importance matrix: about the same sizes, in types that do not need one.
_WITHOUT_IMPORTANCE: dict[str, DynamicMix] = {
    "DQ2": DynamicMix("Q6_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_NL", "Q2_K"),
    "DQ3": DynamicMix("Q8_0", "Q6_K", "Q3_K", "Q4_K", "IQ4_NL", "Q3_K_M"),
}


def recipe_names() -> list[str]:
    """Every name that `make_plan` accepts."""
    return [*DYNAMIC_MIXES, *STOCK_MIXES]


def make_plan(
    config: Dots1Config,
    recipe: str,
    *,
    has_importance: bool = False,
    padding: Padding = "auto",
    overrides: Sequence[Override] = (),
) -> QuantPlan:
    """Decide every tensor's type and the width that experts are stored in.

    Raises:
        UsageError: there is no recipe of that name.
    """
    name = recipe.upper()
    if name in DYNAMIC_MIXES:
        return _dynamic_plan(config, name, has_importance, padding, overrides)
    if name not in STOCK_MIXES:
        raise UsageError(f"no recipe {recipe!r}; there are {', '.join(recipe_names())}")
    [width] = expert_widths(config, "on" if padding == "on" else "off")
    types = stock_types(
        inventory(config, width),
        name,
        n_expert=config.n_routed_experts,
        has_importance=has_importance,
        overrides=overrides,
    )
    mix = stock_mix(name)
    return QuantPlan(mix.name, width, mix.file_type, types)


def _dynamic_plan(
    config: Dots1Config,
    name: str,
    has_importance: bool,
    padding: Padding,
    overrides: Sequence[Override],
) -> QuantPlan:
    mix, label = DYNAMIC_MIXES[name], name
    if not has_importance and name in _WITHOUT_IMPORTANCE:
        mix, label = _WITHOUT_IMPORTANCE[name], f"{name} without importance"
    plans = [
        QuantPlan(label, width, stock_mix(mix.stock_relative).file_type, types)
        for width in expert_widths(config, padding if mix.low or padding != "auto" else "off")
        for types in [_dynamic_types(inventory(config, width), mix, overrides)]
    ]
    # Padding makes types with blocks of 256 fit; "auto" pads if these types save more bytes than
    # the added zeros take (1408 to 1536: yes; 192 to 256: no).
    return min(plans, key=lambda plan: sum(t.nbytes for t in plan.tensors(config)))


def _dynamic_types(
    tensors: Sequence[TensorSpec], mix: DynamicMix, overrides: Sequence[Override]
) -> dict[str, str]:
    types = {}
    for spec in tensors:
        types[spec.name] = "F32"
        if is_quantisable(spec):
            override = override_type(spec.name, overrides)
            types[spec.name] = fallback(override, spec) if override else mix.type_of(spec)
    return types


def expert_widths(config: Dots1Config, padding: Padding) -> list[int]:
    """The widths that experts may be stored in, ascending."""
    width = config.moe_intermediate_size
    both = {"off": width, "on": padded_width(width)}
    return sorted(set(both.values())) if padding == "auto" else [both[padding]]
