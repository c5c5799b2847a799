"""How evenly a model uses its experts, and what caches of them would hit, with a picture.

Hit rates are measured on the second half of a trace. The hot set is chosen on the first half, and
the LRU cache has seen it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dots1_local.calibrate.cache_hits import (
    effective_experts,
    lru_hit_rates,
    stack_distances,
    static_hit_rates,
)
from dots1_local.calibrate.routing import Routing
from dots1_local.chart import INK, LEFT, LINE, TOP, LinearAxis, chart, polyline

__all__ = ["RoutingSummary", "routing_picture", "summarise"]

_EIGHTH = 8
_STEPS = 16  # cache sizes, to all experts

Rates = NDArray[np.float64]


@dataclass(frozen=True)
class RoutingSummary:
    """Figures for each MoE layer of a routing file.

    `top_share` (layers,) is the share of all choices that the `top` most used experts get, and
    `effective` (layers,) the effective number of experts. `lru` and `static` (layers, sizes) are
    hit rates for memory that holds on average so many experts of a layer, `sizes`. All layers share
    the LRU cache; the hot set has as many experts of each.
    """

    routing: Routing
    top: int
    top_share: Rates
    effective: Rates
    sizes: NDArray[np.int64]
    lru: Rates
    static: Rates

    def size_of(self, share: float) -> int:
        """The index of the size that is nearest to a share of the experts."""
        return int(np.abs(self.sizes - share * self.routing.experts).argmin())

    def to_json(self) -> dict[str, Any]:
        """Plain values, for scripts."""
        routing, figures = self.routing, (self.top_share, self.effective, self.lru, self.static)
        names = ("top_share", "effective", "lru", "static")
        layers = [
            {"layer": layer} | {name: each.tolist() for name, each in zip(names, row, strict=True)}
            for layer, row in zip(routing.layers, zip(*figures, strict=True), strict=True)
        ]
        means = {name: each.mean(0).tolist() for name, each in zip(names, figures, strict=True)}
        return {
            "experts": routing.experts,
            "experts_per_token": routing.used,
            "tokens": routing.tokens,
            "traced": routing.trace.shape[1],
            "top": self.top,
            "sizes": self.sizes.tolist(),
            "layers": layers,
            "mean": means,
        }


def summarise(routing: Routing) -> RoutingSummary:
    """Compute all figures; this takes some 5 s for 32,768 tokens of dots.llm1."""
    counts, trace, experts = routing.counts, routing.trace, routing.experts
    layers, half = len(counts), trace.shape[1] // 2
    top = max(1, experts // _EIGHTH)
    first = np.sort(counts, axis=1)[:, ::-1][:, :top]
    steps = np.arange(1, _STEPS) * experts / _STEPS
    sizes = np.unique(steps.round().clip(1, max(1, experts - 1))).astype(np.int64)
    distances = stack_distances(trace, experts)[:, half:]
    return RoutingSummary(
        routing,
        top,
        first.sum(1) / counts.sum(1),
        effective_experts(counts),
        sizes,
        lru_hit_rates(distances, sizes * layers, routing.used),
        static_hit_rates(trace[:, :half], trace[:, half:], experts, sizes),
    )


_STYLE = f"""
.layer {{ fill: none; stroke: {LINE}; stroke-opacity: .35; }}
.mean, .hot {{ fill: none; stroke: {LINE}; stroke-width: 2.5; }}
.hot {{ stroke: {INK}; stroke-dasharray: 5 4; }}
"""


def routing_picture(found: RoutingSummary) -> str:
    """Draw hit rates by cache size: the LRU cache by layer and on average, and the hot set."""
    x_axis, y_axis = LinearAxis(), LinearAxis(upright=True)
    shares = [0.0, *(found.sizes / found.routing.experts).tolist(), 1.0]

    def line(kind: str, rates: Rates, title: str) -> str:
        pairs = zip(shares, [0.0, *rates.tolist(), 1.0], strict=True)
        return polyline(kind, ((x_axis.at(x), y_axis.at(y)) for x, y in pairs), title)

    layers = zip(found.routing.layers, found.lru, strict=True)
    drawn = [
        *(line("layer", rates, f"layer {layer}") for layer, rates in layers),
        line("hot", found.static.mean(0), "hot set, mean of all layers"),
        line("mean", found.lru.mean(0), "LRU, mean of all layers"),
    ]
    for number, (kind, label) in enumerate(
        (("mean", "LRU, mean"), ("layer", "LRU, each layer"), ("hot", "hot set, mean"))
    ):
        y = TOP + 22 + 18 * number
        drawn.append(polyline(kind, ((LEFT + 14, y), (LEFT + 42, y))))
        drawn.append(f'<text x="{LEFT + 50}" y="{y + 4}">{label}</text>')
    return chart(
        f"{found.routing.used} of {found.routing.experts} experts per token",
        x_axis,
        "experts that the cache holds",
        y_axis,
        "choices that it hits",
        _STYLE,
        drawn,
    )
