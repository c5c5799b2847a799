"""What `make bench-quality` computes from its measurements, against hand calculations."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.bench_quality import budgets, finalists, front, known_opponents
from benchmarks.candidates import Candidate
from benchmarks.hand_recipes import hand_recipes, random_recipes, stock_recipes, with_vocabulary
from benchmarks.paired import clustered_error, compare, spearman
from benchmarks.picture import picture
from benchmarks.projection import bits_per_weight, projected_bytes
from benchmarks.quality_report import Pair, Results, report
from benchmarks.quality_runs import Example, Quality
from benchmarks.quality_texts import domains, spread
from benchmarks.refined_report import refined_report
from benchmarks.refined_runs import Refined, Size, TokenCurve
from dots1_local.architecture import Dots1Config, inventory
from dots1_local.errors import UsageError
from dots1_local.evaluate.divergence import Estimate
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.quant.plan import QuantPlan
from dots1_local.quant.stock import require_importance
from tools.train_tiny import GEOMETRIES

# dots.llm1's weights by role, from its published sizes.
ROUTED = 61 * 128 * 3 * 4096 * 1408
SHARED = 61 * 3 * 4096 * 2816
ATTENTION = 62 * 4 * 4096 * 4096
DENSE = 3 * 4096 * 10944
VOCABULARY = 152064 * 4096


@pytest.fixture(scope="module")
def config(tiny: Path) -> Dots1Config:
    return Checkpoint.open(tiny).config


def named(plans: list[QuantPlan], name: str) -> QuantPlan:
    (plan,) = (plan for plan in plans if plan.recipe == name)
    return plan


def test_a_plan_is_projected_role_by_role(config: Dots1Config) -> None:
    sizes = projected_bytes(named(hand_recipes(config), "Q8_0 Q4_K/Q5_0"), config)
    assert sizes["attention"] == pytest.approx(ATTENTION * 8.5 / 8)
    assert sizes["shared"] == pytest.approx(SHARED * 8.5 / 8)
    assert sizes["dense"] == pytest.approx(DENSE * 8.5 / 8)
    assert sizes["embedding"] == sizes["head"] == pytest.approx(VOCABULARY * 6.5625 / 8)
    assert sizes["routed"] == pytest.approx(ROUTED * (2 * 4.5 + 5.5) / 3 / 8)
    assert sizes["router"] == pytest.approx(61 * 128 * (4096 + 1) * 4)
    assert sizes["norm"] == pytest.approx((62 * (2 * 4096 + 2 * 128) + 4096) * 4)


def test_padding_is_projected_as_dots_llm1_pads(config: Dots1Config) -> None:
    sizes = projected_bytes(named(hand_recipes(config), "Q8_0 IQ2_XXS/IQ3_XXS padded"), config)
    assert sizes["routed"] == pytest.approx(ROUTED * 12 / 11 * (2 * 2.0625 + 3.0625) / 3 / 8)
    assert sizes["shared"] == pytest.approx(SHARED * 12 / 11 * 8.5 / 8)
    assert sizes["attention"] == pytest.approx(ATTENTION * 8.5 / 8)


def test_bits_per_weight_are_of_all_weights() -> None:
    assert bits_per_weight(142.77e9) == pytest.approx(8, rel=1e-3)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_recipe_can_be_converted(geometry: str) -> None:
    config = GEOMETRIES[geometry]
    covered = {spec.name for spec in inventory(config)} - {"token_embd.weight"}
    hand = hand_recipes(config)
    plans = [*hand, *stock_recipes(config), *random_recipes(config, 20)]
    for plan in [*plans, with_vocabulary(hand[0], "Q8_0")]:
        plan.tensors(config)  # refuses types that do not fit
        require_importance(plan.types, covered)


def test_hand_recipes_are_what_a_person_would_try(config: Dots1Config) -> None:
    plans = hand_recipes(config)
    assert len({plan.recipe for plan in plans}) == len(plans)
    for name in ("Q6_K IQ2_XXS/IQ3_XXS padded", "Q8_0 IQ3_XXS/IQ4_NL", "Q8_0 Q5_K/Q5_1"):
        types = named(plans, name).types
        always, (gate_up, down) = name.split()[0], name.split()[1].split("/")
        assert types["blk.2.attn_v.weight"] == types["blk.2.ffn_up_shexp.weight"] == always
        assert types["blk.3.ffn_gate_exps.weight"] == gate_up
        assert types["blk.3.ffn_down_exps.weight"] == down
        assert types["output.weight"] == "Q6_K"


def test_random_recipes_are_the_same_each_time_and_differ(config: Dots1Config) -> None:
    plans = random_recipes(config, 30)
    assert plans == random_recipes(config, 30)
    assert len({tuple(plan.types.items()) for plan in plans}) == 30
    assert {plan.expert_width for plan in plans} == {192, 256}


def test_pairs_are_compared_chunk_by_chunk() -> None:
    ours = np.array([[1, 3], [2, 2], [6, 4]], np.float32)  # chunk means 2, 2, 5
    theirs = np.array([[3, 3], [4, 6], [6, 8]], np.float32)  # 3, 5, 7
    found = compare(ours, theirs)
    assert found.ratio == pytest.approx(9 / 15)
    # Differences -1, -3, -2: mean -2, variance 1, standard error 1 / sqrt(3).
    assert found.z == pytest.approx(-2 * 3**0.5)
    # 2 - 1.8, 2 - 3, 5 - 4.2: variance (0.04 + 1 + 0.64) / 2, over the mean 5.
    assert found.error == pytest.approx((0.84 / 3) ** 0.5 / 5)
    # Chunk means 2, 2, 5: variance 3.
    assert clustered_error(ours) == pytest.approx(1)


def test_rank_correlation() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 40, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    # Ranks 1, 2.5, 2.5, 4 beside 1, 2, 3, 4.
    assert spearman([1, 7, 7, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_chunks_are_taken_from_all_of_the_text() -> None:
    chunks = np.arange(100, dtype=np.int32)[:, None]
    assert spread(chunks, 4).ravel().tolist() == [12, 37, 62, 87]
    assert spread(chunks, None) is chunks
    with pytest.raises(UsageError, match="2 to 100"):
        spread(chunks, 101)


def candidate(gigabytes: float, kl: float, recipe: str = "x") -> Candidate:
    per_token = np.full((4, 2), kl, np.float32)
    domains = {"stories": per_token[:1], "foreign": 2 * per_token}
    quality = Quality(1_000_000, Estimate(kl, 0), 2 * kl, Estimate(0.9, 0), per_token, domains)
    return Candidate(
        QuantPlan(recipe, 1, 0, {"output.weight": "Q6_K"}), {"routed": gigabytes * 1e9}, quality, kl
    )


def test_budgets_are_sizes_of_recipes_that_no_smaller_one_matches() -> None:
    hand = [candidate(40 + number, 1 / (1 + number)) for number in range(61)]
    worse = [candidate(40.5 + number, 2) for number in range(60)]
    assert len(front([*hand, *worse])) == len(hand)
    found = [size / 1e9 for size in budgets([*worse, *hand], 45e9, 90e9)]
    # 45 times the seventh root of 2, to its powers.
    assert found == [45, 50, 55, 61, 67, 74, 82, 90]


def test_who_may_be_the_best_at_a_size_is_measured_on_all_of_the_text() -> None:
    close, far, large = candidate(45, 0.0104), candidate(44, 0.012), candidate(50, 0.01)
    best, small = candidate(46, 0.01), candidate(40, 0.1)
    found = finalists([close, far, large, best, small], [41e9, 47e9])
    assert [id(c) for c in found] == [id(c) for c in (small, close, best)]


def results(**changes: Any) -> Results:
    ours, hand, stock = candidate(50, 0.02), candidate(49, 0.025, "hand"), candidate(50, 0.09, "Q2")
    whole: dict[str, Any] = {
        "name": "toy",
        "hand": [hand],
        "stock": [stock],
        "beside_hand": [Pair(45e9, candidate(45, 0.03), None), Pair(50e9, ours, hand)],
        "beside_plain": [Pair(50e9, ours, candidate(48, 0.03, "plain"))],
        "beside_stock": [Pair(50e9, ours, stock)],
        "screened": [candidate(47, 0.05, "left")],
        "random": [candidate(50 + n, 0.02 + n / 1000) for n in range(40)],
        "shared_passages": 0,
    }
    return Results(**{**whole, **changes})


def test_the_report_says_whether_targets_hold() -> None:
    text = report(results())
    assert text.count(": holds") == 7
    assert "geometric mean 0.800: holds" in text
    assert "geometric mean 0.667: holds" in text
    assert "DOES NOT HOLD" not in text
    assert "0.800 ± 0.000" in text
    bad = results(
        shared_passages=3, beside_hand=[Pair(5e10, candidate(50, 0.03), candidate(49, 0.025))]
    )
    assert report(bad).count("DOES NOT HOLD") == 3


def refined(**changes: Any) -> Refined:
    ours, hand = candidate(50, 0.02), candidate(49, 0.025, "hand")
    same, by_hand = candidate(50, 0.012), candidate(49, 0.015, "hand")
    size = Size(50e9, ours, same, candidate(50, 0.01, "anew"), hand, by_hand)
    mixes = [candidate(50 + n, 0.02 + n / 1000) for n in range(40)]
    whole: dict[str, Any] = {
        "name": "toy",
        "sizes": [size, size],
        "random": [(mix, mix) for mix in mixes],
        "curve": TokenCurve(ours, [(170.0, candidate(50, 0.024)), (16000.0, same)]),
    }
    return Refined(**{**whole, **changes})


def test_the_report_on_refinement_compares_pairs_and_domains() -> None:
    text = refined_report(refined())
    assert text.count(": holds") == 6
    assert "DOES NOT HOLD" not in text
    assert "the same plan refined / plain: geometric mean 0.600" in text
    assert "best plain hand recipe: geometric mean 0.400" in text
    assert "### Ratios on stories" in text
    assert "| 170 | 1.200 ± 0.000 | 1.200 ± 0.000 |" in text


def test_predictions_that_are_off_do_not_hold() -> None:
    right = [candidate(50 + n, 0.02 + n / 1000) for n in range(40)]
    wrong = [replace(mix, predicted=1.2 * mix.kl) for mix in right]
    text = refined_report(refined(random=list(zip(right, wrong, strict=True))))
    assert "40 random mixes, plain: predicted differs from measured by 0.0%" in text
    assert "40 random mixes, refined: predicted differs from measured by 20.0%" in text
    assert text.count("DOES NOT HOLD") == 1


def test_chunks_know_their_domain(tiny: Path) -> None:
    found = domains(tiny, None)
    # As many chunks of 512 as the tokens of each kind in training.json make.
    sizes = {"english": 54643, "chinese": 50630, "stories": 15717}
    assert list(dict.fromkeys(found)) == list(sizes)
    for name, tokens in sizes.items():
        assert found.count(name) == pytest.approx(tokens / 512, abs=1)
    assert domains(tiny, 4) == ["english", "english", "chinese", "stories"]


def test_opponents_are_found_in_an_earlier_report(config: Dots1Config) -> None:
    hand = [with_vocabulary(named(hand_recipes(config), "Q8_0 Q4_K/Q5_0"), "Q8_0")]
    mix, best = candidate(50, 0.02), candidate(49, 0.025, hand[0].recipe)
    text = report(results(name="toy", beside_hand=[Pair(50e9, mix, best)]))
    assert known_opponents(text, "toy", config) == hand


def test_the_picture_is_well_formed() -> None:
    both = [results(), results(name="<other>")]
    root = ElementTree.fromstring(picture(both, [refined(), refined()]))
    marks = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "Q2: 50.0 GB, 0.09000" in marks
    assert "anew: 50.0 GB, 0.01000" in marks
    assert root.attrib["width"] == "960"


def test_what_is_measured_is_kept(tiny: Path, tmp_path: Path, config: Dots1Config) -> None:
    example = Example(tiny, tmp_path, chunks=2, workers=1)
    calibrated = example.folder / "calibrated"
    calibrated.mkdir()
    shutil.copy(tiny / "imatrix.gguf", calibrated)
    (calibrated / "refinement.safetensors").touch()  # stands for a finished calibration
    plan = named(hand_recipes(config), "Q8_0 Q4_K/Q5_0")
    (found,) = example.measure([plan])
    records = {path: path.stat().st_mtime_ns for path in example.folder.glob("*.json")}
    assert found.per_token.shape == (2, 255)
    assert 0.0005 < found.kl.value == pytest.approx(found.per_token.mean(), rel=1e-5)
    assert found.nbytes > sum(tensor.nbytes for tensor in plan.tensors(config))
    assert not list(example.folder.glob("*.gguf"))
    (again,) = example.measure([plan])
    assert again.kl == found.kl
    assert {path: path.stat().st_mtime_ns for path in records} == records
    example.measure([with_vocabulary(plan, "Q8_0")])
    assert len(list(example.folder.glob("*.json"))) == 2
