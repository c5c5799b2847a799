"""What refinement does to quality, in Markdown: tables, and whether each target is reached."""

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.candidates import Candidate
from benchmarks.paired import Comparison, compare, spearman
from benchmarks.projection import bits_per_weight
from benchmarks.quality_report import holds, kl_text, table
from benchmarks.refined_runs import Refined, Size, TokenCurve

__all__ = ["refined_report"]

_SAME, _SAME_WORST = 0.65, 0.8
_HAND, _HAND_WORST = 0.5, 0.7
_FOREIGN, _FOREIGN_WORST = 0.85, 1.0
_OFF, _CORRELATION = 0.15, 0.99
_ALL = "all held-out text"

Compared = Callable[[Size], tuple[Candidate, Candidate]]

_REFINED: tuple[tuple[str, Compared], ...] = (
    ("same plan / measured mix", lambda size: (size.same, size.plain)),
    ("planned anew / measured mix", lambda size: (size.anew, size.plain)),
    ("planned anew / hand recipe", lambda size: (size.anew, size.hand)),
    ("hand recipe refined / plain", lambda size: (size.hand_refined, size.hand)),
)


def refined_report(results: Refined) -> str:
    """Tables and verdicts of an example."""
    return "\n\n".join(
        [
            f"## {results.name}, refined",
            "The measured mix and the best hand recipe are those above. Each is refined with its "
            "own types; another mix is planned with the sensitivity of refined tensors. Errors are "
            "standard errors over chunks, of ratios those of paired chunks.",
            "### KL divergence at eight sizes",
            _sizes(results.sizes),
            "### Ratios",
            _ratios(results.sizes, _ALL),
            *(
                f"### Ratios on {domain}\n\n{_ratios(results.sizes, domain)}"
                for domain in results.sizes[0].plain.quality.by_domain
            ),
            "### Tokens an expert",
            _tokens(results.curve),
            "### Targets",
            "\n".join(f"- {line}" for line in verdicts(results)),
        ]
    )


def verdicts(results: Refined) -> list[str]:
    """A line for each target, with its figures."""
    same, anew, hand = (_of(results.sizes, _ALL, compared) for _, compared in _REFINED[:3])
    lines = [
        _verdict("the same plan refined / plain", same, _SAME, _SAME_WORST),
        _verdict("planned anew and refined / best plain hand recipe", hand, _HAND, _HAND_WORST),
        f"planned anew and refined / measured mix: geometric mean {_mean(anew):.3f}",
    ]
    for name, compared in _REFINED[:2]:
        if "foreign" in results.sizes[0].plain.quality.by_domain:
            found = _of(results.sizes, "foreign", compared)
            what = f"{name} on foreign text"
            lines.append(_verdict(what, found, _FOREIGN, _FOREIGN_WORST))
    for name, group in zip(("plain", "refined"), zip(*results.random, strict=True), strict=False):
        lines.append(_prediction(f"{len(group)} random mixes, {name}", group))
    return lines


def _verdict(what: str, found: Sequence[Comparison], mean: float, worst: float) -> str:
    highest = max(found, key=lambda comparison: comparison.ratio)
    held = _mean(found) <= mean and highest.ratio <= worst
    return (
        f"{what}: geometric mean {_mean(found):.3f} (at most {mean}), highest "
        f"{highest.ratio:.3f} ± {highest.error:.3f} (at most {worst}): {holds(held)}"
    )


def _prediction(what: str, group: Sequence[Candidate]) -> str:
    known = [(c.predicted, c.kl) for c in group if c.predicted is not None]
    off = float(np.median([abs(predicted / kl - 1) for predicted, kl in known]))
    rho = spearman(*zip(*known, strict=True))
    held = off <= _OFF and rho >= _CORRELATION
    return (
        f"{what}: predicted differs from measured by {off:.1%} in the median (at most {_OFF:.0%}), "
        f"rank correlation {rho:.4f} (at least {_CORRELATION}): {holds(held)}"
    )


def _of(sizes: Sequence[Size], domain: str, compared: Compared) -> list[Comparison]:
    return [
        compare(*(_figures(candidate, domain) for candidate in compared(size))) for size in sizes
    ]


def _figures(candidate: Candidate, domain: str) -> np.ndarray:
    quality = candidate.quality
    return quality.per_token if domain == _ALL else quality.by_domain[domain]


def _mean(found: Sequence[Comparison]) -> float:
    return float(np.exp(np.mean([np.log(comparison.ratio) for comparison in found])))


def _sizes(sizes: Sequence[Size]) -> str:
    header = (
        "budget", "bpw", "measured mix", "refined", "planned anew and refined", "predicted",
        "best hand recipe", "plain", "refined",
    )  # fmt: skip
    return table(
        header,
        (
            (
                f"{size.budget / 1e9:.2f} GB", f"{bits_per_weight(size.budget):.2f}",
                *map(kl_text, (size.plain, size.same, size.anew)), f"{size.anew.predicted:.5f}",
                size.hand.plan.recipe, kl_text(size.hand), kl_text(size.hand_refined),
            )
            for size in sizes
        ),
    )  # fmt: skip


def _ratios(sizes: Sequence[Size], domain: str) -> str:
    columns = [_of(sizes, domain, compared) for _, compared in _REFINED]
    rows = [
        (f"{size.budget / 1e9:.2f} GB", *(f"{c.ratio:.3f} ± {c.error:.3f}" for c in found))
        for size, *found in zip(sizes, *columns, strict=True)
    ]
    means = ("geometric mean", *(f"**{_mean(found):.3f}**" for found in columns))
    return table(("budget", *(name for name, _ in _REFINED)), [*rows, means])


def _tokens(curve: TokenCurve) -> str:
    domains = [_ALL, *(name for name in curve.plain.quality.by_domain if name == "foreign")]
    rows = []
    for tokens, refined in curve.refined:
        found = [
            compare(_figures(refined, domain), _figures(curve.plain, domain)) for domain in domains
        ]
        rows.append((f"{tokens:,.0f}", *(f"{c.ratio:.3f} ± {c.error:.3f}" for c in found)))
    return table((f"{curve.plain.plan.recipe}: tokens an expert", *domains), rows)
