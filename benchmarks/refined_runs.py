"""Refined files beside plain ones: a plan's own, one made anew for refinement, and a hand recipe's.

All files of a size have at most its bytes, and a plan and its refined file have the same types.
Random plans prove the predictions. Refinement with fewer tokens shows what tokens are worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.candidates import Candidate, allocator, measured
from benchmarks.hand_recipes import random_recipes
from benchmarks.quality_report import Pair
from benchmarks.quality_runs import Example
from benchmarks.quality_texts import N_CTX

__all__ = ["Refined", "Size", "TokenCurve", "refined_results"]

_TOKENS = (100, 200, 400, 800, 1600, 3200, 8000, 16000)  # an expert, on average


@dataclass(frozen=True)
class Size:
    """The files of one budget; `same` is `plain` refined, `anew` is planned for refinement."""

    budget: float
    plain: Candidate
    same: Candidate
    anew: Candidate
    hand: Candidate
    hand_refined: Candidate


@dataclass(frozen=True)
class TokenCurve:
    """A plain file, and the same plan refined with more and more tokens an expert."""

    plain: Candidate
    refined: Sequence[tuple[float, Candidate]]


@dataclass(frozen=True)
class Refined:
    """Everything about an example; `random` has pairs of plain and refined files."""

    name: str
    sizes: Sequence[Size]
    random: Sequence[tuple[Candidate, Candidate]]
    curve: TokenCurve


def refined_results(
    example: Example, screen: Example, pairs: Sequence[Pair], randoms: int
) -> Refined:
    """Refine what `pairs` compare; random plans are measured on the chunks of `screen`."""
    compared = [(pair.ours, pair.other) for pair in pairs if pair.other is not None]
    budgets = [pair.budget for pair in pairs if pair.other is not None]
    same, by_hand = (
        measured(example, [each.plan for each in group], refine=True)
        for group in zip(*compared, strict=True)
    )
    planner = allocator(example, refine=True)
    recipes = [f"ours, refined, in {budget / 1e9:.2f} GB" for budget in budgets]
    plans = [found.plan for found in map(planner.within, budgets, recipes)]
    anew = measured(example, plans, refine=True)
    files = zip(budgets, compared, same, anew, by_hand, strict=True)
    sizes = [Size(at, ours, own, new, hand, last) for at, (ours, hand), own, new, last in files]
    drawn = random_recipes(example.config, randoms)
    random = zip(measured(screen, drawn), measured(screen, drawn, refine=True), strict=True)
    return Refined(example.name, sizes, list(random), _curve(example, sizes[len(sizes) // 2]))


def _curve(example: Example, size: Size) -> TokenCurve:
    config, whole = example.config, example.calibration_chunks
    share = N_CTX * config.num_experts_per_tok / config.n_routed_experts  # tokens of a chunk
    numbers = sorted({max(2, round(tokens / share)) for tokens in _TOKENS})
    points = []
    for chunks in (number for number in numbers if number < whole):
        folder = example.with_fewer_tokens(chunks)
        (found,) = measured(example, [size.plain.plan], refine=True, calibration=folder)
        points.append((chunks * share, found))
    return TokenCurve(size.plain, [*points, (whole * share, size.same)])
