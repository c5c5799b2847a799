"""A picture of KL divergence by size: an SVG for light and dark pages."""

from collections.abc import Iterator, Sequence
from math import ceil, floor, log10
from xml.sax.saxutils import escape

from benchmarks.candidates import Candidate
from benchmarks.quality_report import Results
from benchmarks.refined_runs import Refined

__all__ = ["picture"]

_WIDTH, _HEIGHT = 480, 416  # of one example's panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 74, 46
_STEP = 10  # GB between ticks
# Grey and colours of middle lightness, the same distance from white and from near-black.
_INK = "#768390"
_STYLE = f"""
text {{ font: 12px system-ui, sans-serif; fill: {_INK}; }}
.title {{ font-size: 14px; font-weight: 600; }}
.axis {{ stroke: {_INK}; fill: none; }}
.grid {{ stroke: {_INK}; stroke-opacity: .22; }}
.minor {{ stroke: {_INK}; stroke-opacity: .09; }}
.padded, .unpadded {{ fill: none; stroke: #bf8700; stroke-width: 1.3; }}
.unpadded {{ stroke: #8a63d2; }}
.stock {{ fill: none; stroke: #d1434b; stroke-width: 1.6; }}
.stockname {{ font-size: 10px; fill: #d1434b; }}
.ours, .refined {{ fill: none; stroke: #2f81f7; stroke-width: 2; }}
.refined {{ stroke: #1a9850; }}
.dot {{ fill: #2f81f7; }}
.refineddot {{ fill: #1a9850; }}
.handrefined {{ fill: #bf8700; }}
"""
_LEGEND = (
    ("stock", "stock"),
    ("padded", "hand, padded"),
    ("unpadded", "hand, unpadded"),
    ("handrefined", "hand, refined"),
    ("ours", "ours"),
    ("refined", "ours, refined"),
)
_LINES = ("ours", "refined")


def picture(results: Sequence[Results], refined: Sequence[Refined]) -> str:
    """An SVG with a panel for each example, all on the same scale."""
    bounds = _bounds([c for both in zip(results, refined, strict=True) for c in _shown(*both)])
    panels = [
        _Panel(*both, bounds, x * _WIDTH)
        for x, both in enumerate(zip(results, refined, strict=True))
    ]
    width = _WIDTH * len(panels)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" '
        f'width="{width}" height="{_HEIGHT}" role="img" '
        'aria-label="KL divergence against size: ours below hand recipes and stock mixes, and '
        'refined below plain">',
        f"<style>{_STYLE}</style>",
        *(line for panel in panels for line in panel.draw()),
        "</svg>\n",
    ]
    return "\n".join(lines)


Bounds = tuple[float, float, float, float]  # GB from and to, decimal logarithm of KL from and to


def _bounds(shown: Sequence[Candidate]) -> Bounds:
    sizes = [c.nbytes / 1e9 for c in shown]
    logs = [log10(c.kl) for c in shown]
    left, right = floor(min(sizes) / _STEP) * _STEP, ceil(max(sizes) / _STEP) * _STEP
    return left, right, min(logs) - 0.08, max(logs) + 0.08


def _shown(result: Results, refined: Refined) -> list[Candidate]:
    plain = (*result.hand, *result.screened, *result.stock, *_ours(result))
    return [*plain, *(c for size in refined.sizes for c in (size.anew, size.hand_refined))]


def _ours(result: Results) -> list[Candidate]:
    """Our plans by size, whether compared with hand recipes or with stock mixes."""
    ours = {p.ours.nbytes: p.ours for p in (*result.beside_hand, *result.beside_stock)}
    return [ours[size] for size in sorted(ours)]


class _Panel:
    """One example's part of the picture."""

    def __init__(self, result: Results, refined: Refined, bounds: Bounds, offset: float) -> None:
        self._result, self._refined, self._offset = result, refined, offset
        self._left, self._right, self._low, self._high = bounds

    def draw(self) -> Iterator[str]:
        yield f'<g transform="translate({self._offset} 0)">'
        yield from self._axes()
        for candidate in (*self._result.hand, *self._result.screened):
            padded = candidate.plan.recipe.split(",")[0].endswith("padded")
            yield self._mark(candidate, "padded" if padded else "unpadded")
        for candidate in self._result.stock:
            yield self._mark(candidate, "stock")
        yield from self._stock_names()
        sizes = self._refined.sizes
        yield from (self._mark(size.hand_refined, "handrefined") for size in sizes)
        lines = (_ours(self._result), [size.anew for size in sizes])
        for kind, candidates in zip(_LINES, lines, strict=True):
            points = " ".join(map(self._point, candidates))
            yield f'<polyline class="{kind}" points="{points}"/>'
            yield from (self._mark(candidate, kind) for candidate in candidates)
        yield from self._legend()
        yield "</g>"

    def _x(self, nbytes: float) -> float:
        share = (nbytes / 1e9 - self._left) / (self._right - self._left)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def _y(self, kl: float) -> float:
        share = (self._high - log10(kl)) / (self._high - self._low)
        return _TOP + share * (_HEIGHT - _TOP - _BOTTOM)

    def _point(self, candidate: Candidate) -> str:
        return f"{self._x(candidate.nbytes):.1f},{self._y(candidate.kl):.1f}"

    def _mark(self, candidate: Candidate, kind: str) -> str:
        title = f"{candidate.plan.recipe}: {candidate.nbytes / 1e9:.1f} GB, {candidate.kl:.5f}"
        return _mark(kind, self._x(candidate.nbytes), self._y(candidate.kl), title)

    def _stock_names(self) -> Iterator[str]:
        """Labels right or left of the marks, where there is room; some marks get none."""
        marks = [(self._x(c.nbytes), self._y(c.kl)) for c in _shown(self._result, self._refined)]
        taken = [(x - 4, x + 4, y) for x, y in marks]
        for mix in self._result.stock:
            x, y = self._x(mix.nbytes), self._y(mix.kl)
            width = 6.2 * len(mix.plan.recipe)
            for start in (x + 6, x - 6 - width):
                inside = start > _LEFT and start + width < _WIDTH - _RIGHT
                if inside and not any(
                    start < right and left < start + width and abs(y - other) < 9
                    for left, right, other in taken
                ):
                    name = escape(mix.plan.recipe)
                    yield f'<text class="stockname" x="{start:.1f}" y="{y + 3:.1f}">{name}</text>'
                    taken.append((start, start + width, y))
                    break

    def _axes(self) -> Iterator[str]:
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        yield f'<text class="title" x="{_LEFT}" y="20">{escape(self._result.name)}</text>'
        for kl, label in _ticks(self._low, self._high):
            y = self._y(kl)
            kind = "grid" if label else "minor"
            yield f'<path class="{kind}" d="M{_LEFT} {y:.1f}H{right}"/>'
            if label:
                yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        for size in range(int(self._left), int(self._right) + 1, _STEP):
            x = self._x(size * 1e9)
            yield f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom}"/>'
            yield f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{size}</text>'
        yield f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>'
        middle = (_LEFT + right) / 2
        yield f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle">{_SIZE}</text>'
        yield (
            f'<text transform="translate(14 {(_TOP + bottom) / 2}) rotate(-90)" '
            f'text-anchor="middle">{_KL}</text>'
        )

    def _legend(self) -> Iterator[str]:
        for number, (kind, label) in enumerate(_LEGEND):
            x, y = _LEFT + 6.0 + 130 * (number % 3), 38 + 17 * (number // 3)
            if kind in _LINES:
                yield f'<path class="{kind}" d="M{x - 7} {y}h14"/>'
            yield _mark(kind, x, y, label)
            yield f'<text x="{x + 11}" y="{y + 4}">{label}</text>'


_SIZE, _KL = "GB, projected to dots.llm1", "KL divergence, nats a token"


def _mark(kind: str, x: float, y: float, title: str) -> str:
    shapes = {
        "padded": f'<path d="M{x:.1f} {y - 4:.1f}l4 7h-8z"',
        "unpadded": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"',
        "stock": f'<path d="M{x - 3.5:.1f} {y - 3.5:.1f}l7 7m0-7l-7 7"',
        "handrefined": f'<path d="M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4 -4z"',
        "ours": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"',
        "refined": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"',
    }
    shown = _DOTS.get(kind, kind)
    return f'{shapes[kind]} class="{shown}"><title>{escape(title)}</title></{_TAGS[kind]}>'


_DOTS = {"ours": "dot", "refined": "refineddot"}
_TAGS = {
    "padded": "path", "unpadded": "circle", "stock": "path", "handrefined": "path",
    "ours": "circle", "refined": "circle",
}  # fmt: skip


def _ticks(low: float, high: float) -> Iterator[tuple[float, str]]:
    """Every digit of every decade between; 1, 2 and 5 are labelled."""
    for decade in range(floor(low), ceil(high)):
        for digit in range(1, 10):
            value = digit * 10.0**decade
            if low <= log10(value) <= high:
                yield value, f"{value:.{max(0, -decade)}f}" if digit in (1, 2, 5) else ""
