"""The results of `bench_quality` in Markdown: tables, and whether each target is reached."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from benchmarks.candidates import Candidate
from benchmarks.paired import Comparison, clustered_error, compare, spearman
from benchmarks.projection import bits_per_weight

__all__ = ["Pair", "Results", "holds", "kl_text", "report", "table", "verdict"]

_MEAN_TO_HAND = 0.85
_TO_STOCK, _STOCK_BITS = 0.25, 3.5  # bits per weight up to which that is the target
_CORRELATION, _RANDOM = 0.9, 40


@dataclass(frozen=True)
class Pair:
    """Our plan for a budget, and another recipe of at most its size, if there is one."""

    budget: float
    ours: Candidate
    other: Candidate | None

    @cached_property
    def comparison(self) -> Comparison | None:
        if self.other is None:
            return None
        return compare(self.ours.quality.per_token, self.other.quality.per_token)


@dataclass(frozen=True)
class Results:
    """Everything about an example. `beside_plain` leaves out hand recipes whose embedding and head
    are finer than Q6_K; `screened` are those that were measured on a part of the text only, as
    stock and random ones are."""

    name: str
    hand: Sequence[Candidate]
    stock: Sequence[Candidate]
    beside_hand: Sequence[Pair]
    beside_plain: Sequence[Pair]
    beside_stock: Sequence[Pair]
    screened: Sequence[Candidate]
    random: Sequence[Candidate]
    shared_passages: int

    def everything(self) -> list[Candidate]:
        ours = (pair.ours for pair in (*self.beside_hand, *self.beside_stock))
        return [*self.hand, *self.screened, *self.stock, *ours, *self.random]


def report(results: Results) -> str:
    """Tables and verdicts of an example."""
    scored, part = (group[0].quality.per_token for group in (results.hand, results.stock))
    return "\n\n".join(
        [
            f"## {results.name}\n\n{scored.size:,} scored tokens of {len(scored)} chunks, of which "
            f"stock mixes and screened recipes have {len(part)}; GB are projected to dots.llm1 by "
            "role, MB are this example's files; errors are standard errors over chunks, z is of "
            "the paired difference.",
            "### Ours, and the best hand recipe of equal or smaller size",
            _hand_pairs(results.beside_hand),
            "### Stock mixes, and ours at their size",
            _stock_pairs(results),
            "### Hand recipes",
            _candidates(sorted(results.hand, key=lambda c: c.nbytes)),
            "### Screened and left behind",
            _candidates(sorted(results.screened, key=lambda c: c.nbytes)),
            "### Targets",
            "\n".join(f"- {line}" for line in verdicts(results)),
        ]
    )


def verdicts(results: Results) -> list[str]:
    """A line for each target, with its figures."""
    return [
        *_hand_verdicts("all hand recipes", results.beside_hand),
        *_hand_verdicts("those with a Q6_K embedding and head", results.beside_plain),
        *_stock_verdict(results),
        *_correlations(results),
        f"calibration and held-out text share {results.shared_passages} passages of 100 "
        f"characters: {holds(results.shared_passages == 0)}",
    ]


def _hand_verdicts(against: str, pairs: Sequence[Pair]) -> list[str]:
    found = [pair.comparison for pair in pairs if pair.comparison]
    worst = max(found, key=lambda c: c.ratio)
    mean = float(np.exp(np.mean([np.log(c.ratio) for c in found])))
    return [
        f"at no budget above the best of {against}: worst ratio {worst.ratio:.3f} ± "
        f"{worst.error:.3f} of {len(found)} budgets: {holds(worst.ratio <= 1)}",
        f"at most {_MEAN_TO_HAND} of it on average: geometric mean {mean:.3f}: "
        f"{holds(mean <= _MEAN_TO_HAND)}",
    ]


def _stock_verdict(results: Results) -> list[str]:
    pairs = [p for p in results.beside_stock if bits_per_weight(p.budget) <= _STOCK_BITS]
    if not pairs:
        return []
    worst = max(pairs, key=_ratio)
    above = sum(_ratio(pair) > _TO_STOCK for pair in pairs)
    return [
        f"at most {_TO_STOCK} of stock mixes up to {_STOCK_BITS} bits per weight: worst "
        f"{_ratio(worst):.3f} ({_name(worst.other)}), {above} of {len(pairs)} above: "
        f"{holds(not above)}"
    ]


def _correlations(results: Results) -> list[str]:
    lines = []
    for what, group in (("random recipes", results.random), ("all", results.everything())):
        known = [(c.predicted, c.kl) for c in group if c.predicted is not None]
        if len(known) > 2:
            rho = spearman(*zip(*known, strict=True))
            median = np.median([predicted / kl for predicted, kl in known])
            line = f"rank correlation of predicted and measured, {len(known)} {what}: {rho:.4f}"
            line += f" (predicted / measured: median {median:.2f})"
            if group is results.random:
                line += f": {holds(rho >= _CORRELATION and len(known) >= _RANDOM)}"
            lines.append(line)
    return lines


def _ratio(pair: Pair) -> float:
    return pair.comparison.ratio if pair.comparison else 0.0


def _name(candidate: Candidate | None) -> str:
    return candidate.plan.recipe if candidate else "none is so small"


def holds(target: bool) -> str:
    return "holds" if target else "**DOES NOT HOLD**"


def _hand_pairs(pairs: Sequence[Pair]) -> str:
    header = (
        "budget", "ours", "bpw", "file", "KL divergence", "predicted", "99%", "same top",
        "best hand recipe", "its size", "its KL", "ratio", "z",
    )  # fmt: skip
    return table(
        header,
        (
            (
                _gb(pair.budget), *_size(pair.ours), kl_text(pair.ours), _prediction(pair.ours),
                *_tail(pair.ours), *_other(pair),
            )
            for pair in pairs
        ),
    )  # fmt: skip


def _other(pair: Pair) -> tuple[str, ...]:
    if pair.other is None or pair.comparison is None:
        return _name(pair.other), "", "", "", ""
    return _name(pair.other), _gb(pair.other.nbytes), kl_text(pair.other), *verdict(pair.comparison)


def verdict(found: Comparison) -> tuple[str, str]:
    return f"{found.ratio:.3f} ± {found.error:.3f}", f"{found.z:.1f}"


def _stock_pairs(results: Results) -> str:
    header = (
        "stock mix", "size", "bpw", "file", "KL divergence", "99%", "same top", "ours", "its KL",
        "ratio", "z",
    )  # fmt: skip
    ours = {id(pair.other): pair for pair in results.beside_stock}

    def row(mix: Candidate) -> tuple[str, ...]:
        shown = (_name(mix), *_size(mix), kl_text(mix), *_tail(mix))
        pair = ours.get(id(mix))
        if pair is None or pair.comparison is None:
            return (*shown, "", "", "", "")
        return (*shown, _gb(pair.ours.nbytes), kl_text(pair.ours), *verdict(pair.comparison))

    return table(header, (row(mix) for mix in sorted(results.stock, key=lambda c: c.nbytes)))


def _candidates(candidates: Sequence[Candidate]) -> str:
    header = ("recipe", "size", "bpw", "file", "KL divergence", "predicted", "99%", "same top")
    return table(
        header, ((_name(c), *_size(c), kl_text(c), _prediction(c), *_tail(c)) for c in candidates)
    )


def _size(candidate: Candidate) -> tuple[str, str, str]:
    bits = bits_per_weight(candidate.nbytes)
    return _gb(candidate.nbytes), f"{bits:.2f}", f"{candidate.quality.nbytes / 1e6:.2f} MB"


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def kl_text(candidate: Candidate) -> str:
    return f"{candidate.kl:.5f} ± {clustered_error(candidate.quality.per_token):.5f}"


def _prediction(candidate: Candidate) -> str:
    return "" if candidate.predicted is None else f"{candidate.predicted:.5f}"


def _tail(candidate: Candidate) -> tuple[str, str]:
    return f"{candidate.quality.percentile:.4f}", f"{100 * candidate.quality.same_top.value:.2f}%"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
