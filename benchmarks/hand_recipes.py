"""Plans to compare ours with: recipes that a person would write, stock mixes, and random plans.

A hand recipe has one type for what every token passes through (attention, shared experts, the dense
layer), one for embedding and head, one for the routed experts' gate and up and one for their down.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dots1_local.architecture import Dots1Config, TensorSpec, inventory, padded_width
from dots1_local.ggml import TYPES
from dots1_local.quant.plan import QuantPlan
from dots1_local.quant.recipes import make_plan
from dots1_local.quant.stock import STOCK_MIXES, is_quantisable

__all__ = ["hand_recipes", "random_recipes", "stock_recipes", "with_vocabulary"]

_ALWAYS = ("Q8_0", "Q6_K")
_LADDER = (
    "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K",
    "Q5_K", "Q6_K",
)  # fmt: skip
_NARROW = ("IQ4_NL", "Q5_0", "Q5_1", "Q8_0")  # for down projections as they are
_WIDEST_STEP = 1.1  # bits per weight from gate and up to down: IQ2_XXS/IQ3_XXS, not /IQ3_S
_WIDEST_NARROW_STEP = 2.6  # from 4.5 bits on; under them down has no choice

# A random plan also draws from these.
_RANDOM = (*_LADDER[1:], *_NARROW)
_FILE_TYPE = 0  # a label in files that are deleted again


def hand_recipes(config: Dots1Config) -> list[QuantPlan]:
    """Every sensible pair of types, padded and not, with embedding and head Q6_K."""
    return [
        _by_role(config, padded, always, "Q6_K", gate_up, down)
        for padded, pairs in ((True, _padded_pairs()), (False, _narrow_pairs()))
        for gate_up, down in pairs
        for always in _ALWAYS
    ]


def with_vocabulary(plan: QuantPlan, kind: str) -> QuantPlan:
    """The same recipe with another type for embedding and head."""
    outer = {"token_embd.weight": kind, "output.weight": kind}
    return replace(plan, recipe=f"{plan.recipe}, outer {kind}", types={**plan.types, **outer})


def stock_recipes(config: Dots1Config) -> list[QuantPlan]:
    """llama-quantize's mixes up to Q5_K_M, with importance; those for models that were trained with
    a few values are left out."""
    plans = {
        mix.name: make_plan(config, mix.name, has_importance=True, padding="off")
        for mix in STOCK_MIXES.values()
        if mix.quantised
        and TYPES[mix.default].candidate
        and mix.name not in ("Q6_K", "Q8_0", "Q5_1", "MXFP4_MOE")
    }
    return list(plans.values())


def random_recipes(config: Dots1Config, count: int, seed: int = 1) -> list[QuantPlan]:
    """Plans like those that an allocator would make from wrong sensitivity.

    A level is drawn for the file, offsets for parts and layers, and some more for each tensor.
    """
    draw = random.Random(seed)
    return [_random(config, draw, f"random {number}") for number in range(1, count + 1)]


def _padded_pairs() -> Iterator[tuple[str, str]]:
    """Pairs of types in which gate and up have at most the bits of down, and not far fewer."""
    for gate_up in _LADDER:
        for down in _LADDER:
            step = TYPES[down].bpw - TYPES[gate_up].bpw
            if 0 <= step <= _WIDEST_STEP and TYPES[down].bpw <= TYPES["Q4_K"].bpw:
                yield gate_up, down


def _narrow_pairs() -> Iterator[tuple[str, str]]:
    for down in _NARROW:
        for gate_up in _LADDER:
            step = TYPES[down].bpw - TYPES[gate_up].bpw
            if step >= 0 and (down == _NARROW[0] or step <= _WIDEST_NARROW_STEP):
                yield gate_up, down


def _by_role(
    config: Dots1Config, padded: bool, always: str, vocabulary: str, gate_up: str, down: str
) -> QuantPlan:
    def wanted(spec: TensorSpec) -> str:
        if spec.role in ("embedding", "head"):
            return vocabulary
        if spec.role == "routed":
            return down if spec.part == "ffn_down_exps" else gate_up
        return always

    width, tensors = _stored(config, padded)
    types = {
        spec.name: _fitting(wanted(spec), spec) if is_quantisable(spec) else "F32"
        for spec in tensors
    }
    name = f"{always} {gate_up}/{down}{' padded' if padded else ''}"
    return QuantPlan(name, width, _FILE_TYPE, types)


def _fitting(kind: str, spec: TensorSpec) -> str:
    """The type, or Q8_0 if its blocks do not fit the rows; no pair above needs this."""
    return kind if TYPES[kind].fits(spec.columns) else "Q8_0"


def _stored(config: Dots1Config, padded: bool) -> tuple[int, Sequence[TensorSpec]]:
    width = config.moe_intermediate_size
    width = padded_width(width) if padded else width
    return width, inventory(config, width)


def _random(config: Dots1Config, draw: random.Random, name: str) -> QuantPlan:
    padded = draw.random() < 0.5
    width, tensors = _stored(config, padded)
    matrices = [spec for spec in tensors if is_quantisable(spec)]
    level = draw.uniform(2.1, 3.9) if padded else draw.uniform(2.3, 6)
    lift = draw.uniform(1.0, 3.5)  # of all but routed experts
    part = {part: draw.gauss(0, 0.5) for part in sorted({spec.part for spec in matrices})}
    layer = {layer: draw.gauss(0, 0.4) for layer in (None, *range(config.num_hidden_layers))}
    types = dict.fromkeys((spec.name for spec in tensors), "F32")
    for spec in matrices:
        bits = level + part[spec.part] + layer[spec.layer] + draw.gauss(0, 0.5)
        bits += 0 if spec.role == "routed" else lift
        types[spec.name] = _nearest(bits, spec, draw)
    return QuantPlan(name, width, _FILE_TYPE, types)


def _nearest(bits: float, spec: TensorSpec, draw: random.Random) -> str:
    """A random type of about this size."""
    # An embedding has no importance, which these want; and nobody takes them for attention.
    kinds = [
        kind
        for kind in _RANDOM
        if TYPES[kind].fits(spec.columns)
        and not (TYPES[kind].needs_importance and spec.role != "routed")
    ]
    return min(kinds, key=lambda kind: abs(TYPES[kind].bpw - bits) + draw.random() * 0.15)
