"""Allocated mixes, hand recipes and stock mixes of equal size, plain and refined: KL divergence.

    python -m benchmarks.bench_quality examples/dots1-tiny examples/dots1-deep
    python -m benchmarks.bench_quality examples/dots1-tiny --chunks 16 --random 0    a smoke run
    python -m benchmarks.bench_quality examples/dots1-tiny --opponents benchmarks/quality.md

An example is a checkpoint folder with calibration.txt and heldout.txt. It is calibrated on the one;
every recipe is converted with that importance and compared on the other with the BF16 conversion.
Ours are allocated to the projected sizes (`projection`) of hand recipes that no smaller one is as
good as, and of the stock mixes. Hand recipes are screened on a part of the text; those near the
best are measured on all of it, as are ours. Then the mixes and the best hand recipes are refined
(`refined_runs`); with the report of an earlier run as --opponents, only this is done. Tables go to
stdout; results are saved in --work, so that a run that was stopped can be resumed.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.candidates import Candidate, allocator, measured
from benchmarks.hand_recipes import hand_recipes, random_recipes, stock_recipes, with_vocabulary
from benchmarks.picture import picture
from benchmarks.projection import bits_per_weight, projected_bytes
from benchmarks.quality_report import Pair, Results, report
from benchmarks.quality_runs import Example
from benchmarks.quality_texts import shared_passages
from benchmarks.refined_report import refined_report
from benchmarks.refined_runs import refined_results
from dots1_local.architecture import Dots1Config
from dots1_local.quant.plan import QuantPlan

_BUDGETS = 8
_LARGEST = 5.5 / bits_per_weight(1)  # bytes at 5.5 bits per weight
_MARGIN = 1.05  # hand recipes up to there are worth measuring
_NEAR = 1.06  # times the best's divergence


def run(example: Example, screen: Example, randoms: int) -> Results:
    """Measure an example: all recipes on `screen` chunks, and the best ones on all chunks."""
    plain = _plain(screen)
    hand = plain + measured(screen, [with_vocabulary(c.plan, "Q8_0") for c in front(plain)])
    stock = measured(screen, stock_recipes(screen.config))
    planner = allocator(screen)

    def ours(on: Example, sizes: Sequence[float]) -> list[Candidate]:
        recipes = [f"ours in {size / 1e9:.2f} GB" for size in sizes]
        found = map(planner.within, sizes, recipes)
        return measured(on, [allocation.plan for allocation in found])

    sizes = [planner.smallest, *budgets(hand, planner.smallest, _LARGEST)]
    beaten = [mix for mix in stock if mix.nbytes >= planner.smallest]
    beside_stock = ours(screen, [mix.nbytes for mix in beaten])
    finals = measured(example, [c.plan for c in finalists(hand, sizes)])
    names = {c.plan.recipe for c in finals}
    pairs = list(zip(sizes, ours(example, sizes), strict=True))
    return Results(
        example.name,
        finals,
        stock,
        [Pair(size, found, _best(finals, size)) for size, found in pairs],
        [Pair(size, found, _best(_q6_outside(finals), size)) for size, found in pairs],
        [Pair(mix.nbytes, found, mix) for found, mix in zip(beside_stock, beaten, strict=True)],
        [c for c in hand if c.plan.recipe not in names],
        measured(screen, random_recipes(screen.config, randoms)),
        shared_passages(example.path),
    )


def budgets(hand: Sequence[Candidate], smallest: float, largest: float) -> list[float]:
    """Sizes of the best hand recipes, at about equal ratios."""
    sizes = [c.nbytes for c in front(hand) if smallest <= c.nbytes <= largest]
    chosen: list[float] = []
    for number in range(min(_BUDGETS, len(sizes))):
        target = sizes[0] * (sizes[-1] / sizes[0]) ** (number / (_BUDGETS - 1))
        left = [size for size in sizes if size not in chosen]
        chosen.append(min(left, key=lambda size: abs(size / target - 1)))
    return sorted(chosen)


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that are better than all others of equal or smaller size, by size."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.nbytes, c.kl)):
        if not best or candidate.kl < best[-1].kl:
            best.append(candidate)
    return best


def finalists(candidates: Sequence[Candidate], sizes: Sequence[float]) -> list[Candidate]:
    """The candidates that may turn out to be the best of their size on more text."""
    kept: list[Candidate] = []
    for group in (candidates, _q6_outside(candidates)):
        for size in sizes:
            if best := _best(group, size):
                near = [c for c in group if c.nbytes <= size and c.kl <= _NEAR * best.kl]
                kept += [c for c in near if c not in kept]
    return kept


def _plain(example: Example) -> list[Candidate]:
    """All hand recipes with Q6_K embedding and head; only the best are also tried with Q8_0."""
    plans = hand_recipes(example.config)
    sizes = (sum(projected_bytes(plan, example.config).values()) for plan in plans)
    largest = _MARGIN * _LARGEST
    return measured(example, [p for p, size in zip(plans, sizes, strict=True) if size <= largest])


def _q6_outside(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with Q6_K embedding and head."""
    return [c for c in candidates if c.plan.types["output.weight"] == "Q6_K"]


def _best(candidates: Sequence[Candidate], nbytes: float) -> Candidate | None:
    """The best candidate of at most `nbytes`."""
    fitting = [c for c in candidates if c.nbytes <= nbytes]
    return min(fitting, key=lambda c: c.kl, default=None)


def known_opponents(report: str, example: str, config: Dots1Config) -> list[QuantPlan]:
    """The best hand recipes of an example in the report of an earlier run, by size."""
    pairs = report.split(f"## {example}\n")[1].split("### Stock mixes", maxsplit=1)[0]
    plans = {plan.recipe: plan for plan in hand_recipes(config)}
    named = [line.split(" | ")[8] for line in pairs.splitlines() if line.count(" | ") == 12]
    found = ((name, *name.split(", outer ")) for name in named)
    return [
        with_vocabulary(plans[plain], kind[0]) if kind else plans[plain]
        for _, plain, *kind in found
        if plain in plans
    ]


def pairs_of(example: Example, opponents: Sequence[QuantPlan]) -> list[Pair]:
    """Our plans for the sizes of opponents, beside these."""
    others = measured(example, opponents)
    planner = allocator(example)
    plans = [planner.within(c.nbytes, f"ours in {c.nbytes / 1e9:.2f} GB").plan for c in others]
    ours = measured(example, plans)
    return [Pair(c.nbytes, mix, c) for mix, c in zip(ours, others, strict=True)]


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("examples", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--chunks", type=int, help="of 512 tokens of held-out text [all]")
    parser.add_argument("--screen", type=int, default=48, help="chunks to choose opponents on")
    parser.add_argument("--foreign", type=int, default=32, help="chunks of foreign text")
    parser.add_argument("--random", type=int, default=40, help="recipes to prove predictions on")
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="recipes at a time")
    parser.add_argument(
        "--opponents", type=Path, help="a report with the best hand recipes: only refine"
    )
    parser.add_argument("--svg", type=Path, help="draw a picture")
    options = parser.parse_args()
    results, refined = [], []
    for path in options.examples:
        chunks, work, workers = options.chunks, options.work, options.workers
        example = Example(path.resolve(), work, chunks, workers, options.foreign)
        screen = Example(
            path.resolve(), work, min(options.screen, chunks or options.screen), workers
        )
        if options.opponents:
            known = known_opponents(options.opponents.read_text(), example.name, example.config)
            pairs: Sequence[Pair] = pairs_of(example, known)
        else:
            results.append(run(example, screen, options.random))
            print(report(results[-1]), flush=True)
            pairs = results[-1].beside_hand
        refined.append(refined_results(example, screen, pairs, options.random))
        print(refined_report(refined[-1]), flush=True)
    if options.svg and results:
        options.svg.write_text(picture(results, refined), encoding="utf-8")


if __name__ == "__main__":
    main()
