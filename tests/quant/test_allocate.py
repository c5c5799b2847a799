"""Types under a budget: against every possible plan of a small model, and rules on real ones."""

import re
from collections.abc import Mapping
from dataclasses import astuple, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from dots1_local.architecture import Dots1Config, inventory
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.ggml import TYPES
from dots1_local.quant.allocate import Allocator
from dots1_local.quant.choices import best_change
from dots1_local.quant.plan import QuantPlan, parse_overrides
from dots1_local.quant.sensitivity import Effect, Sensitivity
from tests.micro import micro_config
from tests.quant.made_up import made_up
from tools.make_wide import published_config

MICRO = Dots1Config.from_json(
    micro_config(hidden_size=256, intermediate_size=512, moe_intermediate_size=256)
)
PUBLISHED = Dots1Config.from_json(published_config())


@pytest.fixture(scope="module")
def config(tiny: Path) -> Dots1Config:
    """Steps between types are coarse there, and its experts take no blocks of 256."""
    return Checkpoint.open(tiny).config


@pytest.fixture(scope="module")
def allocator(config: Dots1Config) -> Allocator:
    return Allocator(config, made_up(config))


def nbytes(plan: QuantPlan, config: Dots1Config) -> int:
    return sum(tensor.nbytes for tensor in plan.tensors(config))


@pytest.mark.parametrize("seed", range(4))
def test_as_good_as_the_best_of_all_plans(seed: int) -> None:
    kinds = ("Q8_0", "Q6_K", "Q4_K", "Q3_K")
    sensitivity = made_up(MICRO, kinds=kinds, seed=seed)
    free = [name for name in sensitivity.tensors if "ffn" in name and "shexp" not in name]
    free += ["token_embd.weight", "output.weight"]
    fixed = parse_overrides(["attn=Q8_0", "shexp=Q8_0"])
    allocator = Allocator(MICRO, sensitivity, overrides=fixed)
    elements = {spec.name: spec.elements for spec in inventory(MICRO)}
    plans = np.array(list(product(range(4), repeat=len(free))))
    size, damage, flips = np.full((3, len(plans)), 0.0)
    for name in elements.keys() - set(free):
        kind = "Q8_0" if name in sensitivity.tensors else "F32"
        size += elements[name] * TYPES[kind].bpw / 8
        effect = sensitivity.tensors.get(name, {}).get(kind, Effect(0, 0, 0))
        damage, flips = damage + effect.damage, flips + effect.flips
    for place, name in enumerate(free):
        effects = [sensitivity.tensors[name][kind] for kind in kinds]
        size += np.array([elements[name] * TYPES[k].bpw / 8 for k in kinds])[plans[:, place]]
        damage += np.array([e.damage for e in effects])[plans[:, place]]
        flips += np.array([e.flips for e in effects])[plans[:, place]]
    divergence = damage + np.sqrt(flips)
    for budget in np.linspace(size.min(), size.max(), 25):
        best = divergence[size <= budget].min()
        assert allocator.within(float(budget), "").kl <= 1.01 * best
        assert allocator.reaching(1.01 * best, "").nbytes <= size[divergence <= best].min()


@pytest.mark.parametrize("seed", range(3))
def test_one_layout_is_as_good_as_the_best_of_all_plans_that_have_it(seed: int) -> None:
    config = replace(MICRO, num_hidden_layers=4)
    kinds = ("Q8_0", "Q6_K", "Q4_K", "IQ4_NL", "Q3_K")
    sensitivity = made_up(config, kinds=kinds, seed=seed)
    experts = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    free = ["token_embd", "^output.weight", "blk.0.ffn_gate", "blk.0.ffn_down", *experts]
    fixed = parse_overrides(["attn=Q8_0", "shexp=Q8_0", "ffn_up.weight=Q8_0"])
    allocator = Allocator(config, sensitivity, overrides=fixed, one_layout=True)
    plans = np.array(list(product(range(len(kinds)), repeat=len(free))))
    size, damage, flips = np.zeros((3, len(plans)))
    for spec in inventory(config):
        measured = sensitivity.tensors.get(spec.name)
        places = [place for place, part in enumerate(free) if re.search(part, spec.name)]
        chosen = plans[:, places[0]] if measured and places else np.zeros(len(plans), int)
        by_kind = [(TYPES[k].bpw, *astuple(measured[k])[1:]) for k in kinds] if measured else []
        figures = np.array(by_kind or [(32, 0, 0)])[chosen]
        size += spec.elements * figures[:, 0] / 8
        damage += figures[:, 1]
        flips += figures[:, 2]
    divergence = damage + np.sqrt(flips)
    for budget in np.linspace(size.min(), size.max(), 25):
        best = divergence[size <= budget].min()
        found = allocator.within(float(budget), "")
        assert found.kl == pytest.approx(best)
        assert nbytes(found.plan, config) == found.nbytes <= budget
        for part in experts:
            assert len({kind for name, kind in found.plan.types.items() if part in name}) == 1
        least = size[divergence <= best * (1 + 1e-9)].min()
        assert allocator.reaching(best * (1 + 1e-9), "").nbytes <= 1.001 * least


def test_what_one_layout_costs(config: Dots1Config) -> None:
    sensitivity = made_up(config)
    free, one = (Allocator(config, sensitivity, one_layout=each) for each in (False, True))
    half = 0.5 * free.largest
    found, best = one.within(half, ""), free.within(half, "")
    assert found.own_types is not None
    assert (found.own_types.nbytes, found.own_types.kl) == (best.nbytes, best.kl)
    assert best.own_types is None
    assert found.kl > best.kl
    assert found.kl == pytest.approx(sensitivity.predict(found.plan.types))
    assert sum(found.shares.values()) == pytest.approx(found.kl)
    assert found.shares.keys() == best.shares.keys()
    moves = [move for move in found.downgrades if move.tensor.startswith("blk.*.")]
    for move in moves:
        same = {n: k for n, k in found.plan.types.items() if n.endswith(move.tensor[5:])}
        assert set(same.values()) == {move.before}
        changed = dict(found.plan.types) | dict.fromkeys(same, move.after)
        assert sensitivity.predict(changed) - found.kl == pytest.approx(move.kl, rel=1e-6)


def test_layers_that_must_differ_cannot_have_one_layout(config: Dots1Config) -> None:
    overrides = parse_overrides([r"blk\.1\.ffn_up_exps=Q8_0", r"blk\.2\.ffn_up_exps=Q5_0"])
    with pytest.raises(UsageError, match="ffn_up_exps"):
        Allocator(config, made_up(config), overrides=overrides, one_layout=True)
    same = Allocator(config, made_up(config), overrides=overrides[:1], one_layout=True)
    types = same.within(same.smallest, "").plan.types
    assert {kind for name, kind in types.items() if "ffn_up_exps" in name} == {"Q8_0"}


def test_lands_just_under_and_never_gets_worse_by_more_bytes(
    allocator: Allocator, config: Dots1Config
) -> None:
    before = np.inf
    for budget in np.linspace(allocator.smallest, 0.8 * allocator.largest, 60):
        found = allocator.within(float(budget), "")
        assert nbytes(found.plan, config) == found.nbytes <= budget
        assert found.nbytes >= 0.999 * budget or budget == allocator.smallest
        assert found.kl <= before
        before = found.kl


def test_the_prediction_is_that_of_the_plan(allocator: Allocator, config: Dots1Config) -> None:
    sensitivity = made_up(config)
    found = allocator.within(0.5 * allocator.largest, "half")
    assert found.plan.recipe == "half"
    assert found.kl == pytest.approx(sensitivity.predict(found.plan.types))
    assert sum(found.shares.values()) == pytest.approx(found.kl)
    for move in (*found.upgrades, *found.downgrades):
        assert found.plan.types[move.tensor] == move.before
        changed = QuantPlan(
            "", found.plan.expert_width, 0, {**found.plan.types, move.tensor: move.after}
        )
        after = sensitivity.predict(changed.types)
        assert after - found.kl == pytest.approx(move.kl, rel=1e-6)
        assert nbytes(changed, config) - found.nbytes == move.nbytes
    assert all(found.nbytes + m.nbytes > 0.5 * allocator.largest for m in found.upgrades)
    assert all(move.nbytes < 0 < move.kl for move in found.downgrades)


def test_a_divergence_is_reached_in_the_fewest_bytes(allocator: Allocator) -> None:
    for kl in (0.1, 0.03, 0.01, 0.003):
        found = allocator.reaching(kl, "")
        assert found.kl <= kl
        assert allocator.within(0.995 * found.nbytes, "").kl > kl


def test_a_further_byte_is_worth_no_more_than_the_best_upgrade(allocator: Allocator) -> None:
    loose = allocator.reaching(1e6, "")
    assert loose.nbytes == allocator.smallest
    assert not loose.downgrades
    best = max(-move.kl / move.nbytes for move in loose.upgrades)
    assert loose.price == pytest.approx(best * 1e9)
    everything = allocator.within(allocator.largest, "")
    assert everything.price == 0
    assert not everything.upgrades


def test_one_tensor_walks_the_lower_hull() -> None:
    free, kinds = "token_embd.weight", ("Q8_0", "Q6_K", "Q4_K", "Q3_K", "Q2_K")
    measured = made_up(MICRO, kinds=kinds)
    # Q4_K lies above the line from Q3_K to Q6_K; Q6_K, Q3_K and Q2_K are on the hull.
    damage = dict(zip(kinds, (0.0, 0.1, 0.55, 0.6, 2.0), strict=True))
    tensors = {n: {k: Effect(0, 0, 0) for k in kinds} for n in measured.tensors}
    tensors[free] = {kind: Effect(0, value, 0) for kind, value in damage.items()}
    allocator = Allocator(
        MICRO, measured_as(measured, tensors), overrides=parse_overrides(["blk=Q8_0"])
    )
    steps = [allocator.reaching(kl, "").plan.types[free] for kl in (2.0, 1.9, 0.58, 0.2)]
    assert steps == ["Q2_K", "Q3_K", "Q4_K", "Q6_K"]


def test_bytes_that_would_only_add_damage_stay_unused(config: Dots1Config) -> None:
    measured = made_up(config, kinds=("Q8_0", "Q5_0", "IQ4_NL"))
    tensors = {
        name: {"Q8_0": Effect(0, 2, 0), "Q5_0": Effect(0, 1, 0), "IQ4_NL": Effect(0, 3, 0)}
        for name in measured.tensors
    }
    allocator = Allocator(config, measured_as(measured, tensors))
    found = allocator.within(allocator.largest, "")
    assert set(found.plan.types.values()) == {"Q5_0", "F32"}
    with pytest.raises(UsageError, match="too large"):
        allocator.within(1.01 * allocator.largest, "")


def test_the_real_model() -> None:
    sensitivity = made_up(PUBLISHED)
    allocator = Allocator(PUBLISHED, sensitivity)
    widths = []
    for size in (52e9, 90e9):
        found = allocator.within(size, "")
        assert 0.999 * size <= found.nbytes <= size
        assert found == Allocator(PUBLISHED, sensitivity).within(size, "")
        assert found.other is not None
        assert found.kl <= found.other.kl
        widths.append(found.plan.expert_width)
    assert widths == [1536, 1408]


def test_overrides_padding_and_missing_importance_are_respected(config: Dots1Config) -> None:
    measured = made_up(config)
    uncovered = "blk.1.ffn_up_exps.weight"
    for padding, width in (("on", 256), ("off", 192)):
        allocator = Allocator(
            config,
            measured,
            covered=measured.tensors.keys() - {uncovered},
            padding=padding,  # type: ignore[arg-type]
            overrides=parse_overrides(["attn_q=F16", "ffn_down_exps=Q4_K"]),
        )
        found = allocator.within(1.02 * allocator.smallest, "")
        assert found.plan.expert_width == width
        assert found.other is None
        assert found.plan.types["blk.2.attn_q.weight"] == "F16"
        assert found.plan.types["blk.2.ffn_down_exps.weight"] == (
            "Q4_K" if width == 256 else "Q5_0"
        )
        assert found.plan.types[uncovered] in ("IQ3_S", "Q3_K", "Q2_K")


def test_the_cost_function_can_be_replaced(allocator: Allocator, config: Dots1Config) -> None:
    doubled = Allocator(config, made_up(config), cost=lambda tensor: 2 * tensor.nbytes)
    half = 0.5 * allocator.largest
    assert doubled.within(2 * half, "").plan == allocator.within(half, "").plan


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_budgets_out_of_reach_name_both_ends(allocator: Allocator, factor: float) -> None:
    end = allocator.smallest if factor < 1 else allocator.largest
    says = "2 B is too .* 0 B .* 1 B"
    words = {factor * end: "2 B", allocator.smallest: "0 B", allocator.largest: "1 B"}
    with pytest.raises(UsageError, match=says):
        allocator.within(factor * end, "", lambda count: words[count])


def test_impossible_requests_are_refused(allocator: Allocator, config: Dots1Config) -> None:
    with pytest.raises(UsageError, match=r"KL divergence .* predicted"):
        allocator.reaching(0.9 * allocator.least_kl, "")
    with pytest.raises(UsageError, match="KL divergence of nan"):
        allocator.reaching(float("nan"), "")
    measured = made_up(config)
    less = {n: e for n, e in measured.tensors.items() if n != "blk.3.attn_v.weight"}
    with pytest.raises(Dots1Error, match=r"has no type for blk\.3\.attn_v\.weight"):
        Allocator(config, measured_as(measured, less))
    with pytest.raises(Dots1Error, match=r"Q4_0 on blk\.0\.attn_k\.weight was not"):
        Allocator(config, measured, overrides=parse_overrides(["attn_k=Q4_0"]))
    with pytest.raises(Dots1Error, match="another model: its hidden_size is 256"):
        Allocator(PUBLISHED, measured)


@pytest.mark.parametrize("seed", range(30))
def test_the_best_change_of_one_or_two(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost, loss = rng.integers(-9, 9, (2, 5, 4)).astype(float)
    cost[:, 0] = loss[:, 0] = 0  # the present types
    cost[rng.random(cost.shape) < 0.1] = np.inf
    slack = float(rng.integers(0, 6))
    moves = [(t, k) for t in range(5) for k in range(4)]
    found = [loss[move] for move in moves if cost[move] <= slack]
    for one, other in product(moves, moves):
        if one[0] < other[0] and cost[one] + cost[other] <= slack:
            found.append(loss[one] + loss[other])
    best = min(found)
    change = best_change(cost, loss, slack, 0.5)
    assert sum(loss[move] for move in change) == best
    assert sum(cost[move] for move in change) <= slack
    assert len({tensor for tensor, _ in change}) == len(change)


def measured_as(
    sensitivity: Sensitivity, tensors: Mapping[str, Mapping[str, Effect]]
) -> Sensitivity:
    return Sensitivity(sensitivity.geometry, sensitivity.imatrix, 1, "Q4_K", 0.01, 0.006, tensors)
