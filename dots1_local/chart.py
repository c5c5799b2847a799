"""A chart in SVG, for light and dark pages: two axes with their grid, and what is drawn."""

from collections.abc import Iterable, Sequence
from math import ceil, floor, log10
from xml.sax.saxutils import escape

__all__ = ["INK", "LEFT", "LINE", "TOP", "LinearAxis", "LogAxis", "chart", "polyline"]

INK, LINE = "#768390", "#2f81f7"  # as far from white as from near-black
WIDTH, HEIGHT = 560, 380
LEFT, RIGHT, TOP, BOTTOM = 66, WIDTH - 24, 56, HEIGHT - 52
_STYLE = f"""
text {{ font: 12px system-ui, sans-serif; fill: {INK}; }}
.title {{ font-size: 14px; font-weight: 600; }}
.grid {{ stroke: {INK}; stroke-opacity: .22; }}
"""


class LogAxis:
    """A logarithmic axis that shows all of `values`, from left to right or `upright`."""

    def __init__(self, values: Iterable[float], *, upright: bool = False) -> None:
        logs = [log10(value) for value in values]
        margin = max(0.05 * (max(logs) - min(logs)), 0.02)
        self._low, self._high = min(logs) - margin, max(logs) + margin
        self._start, self._end = (BOTTOM, TOP) if upright else (LEFT, RIGHT)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        share = (log10(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values with labels: 1, 2 and 5 times powers of ten, or all digits if few fit."""
        powers = range(floor(self._low), ceil(self._high) + 1)
        for digits in ((1, 2, 5), range(1, 10), [n / 10 for n in range(10, 100)]):
            found = [d * 10.0**power for power in powers for d in list(digits)]
            shown = [value for value in found if self._low <= log10(value) <= self._high]
            if len(shown) >= 3:
                break
        return [(value, f"{value:g}") for value in shown]


class LinearAxis:
    """An axis from 0 to 1 with a tick at each quarter, labelled in percent."""

    def __init__(self, *, upright: bool = False) -> None:
        self._start, self._end = (BOTTOM, TOP) if upright else (LEFT, RIGHT)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self._start + value * (self._end - self._start)

    def ticks(self) -> list[tuple[float, str]]:
        """The quarters, with labels."""
        return [(quarter / 4, f"{quarter / 4:.0%}") for quarter in range(5)]


Axis = LogAxis | LinearAxis


def chart(
    title: str, x: Axis, x_label: str, y: Axis, y_label: str, style: str, drawn: Sequence[str]
) -> str:
    """The SVG text; `drawn` are elements that lie over the grid, with classes from `style`."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        f"<style>{_STYLE}{style}</style>",
        f'<text class="title" x="{LEFT}" y="22">{escape(title)}</text>',
        f'<text x="{LEFT}" y="40">{escape(y_label)}</text>',
        f'<text x="{RIGHT}" y="{HEIGHT - 10}" text-anchor="end">{escape(x_label)}</text>',
        *(_x_tick(x.at(value), label) for value, label in x.ticks()),
        *(_y_tick(y.at(value), label) for value, label in y.ticks()),
        *drawn,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def polyline(kind: str, points: Iterable[tuple[float, float]], title: str = "") -> str:
    """A line of a class through pixels, with a tooltip if it has a title."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    if not title:
        return f'<polyline class="{kind}" points="{path}"/>'
    return f'<polyline class="{kind}" points="{path}"><title>{escape(title)}</title></polyline>'


def _x_tick(x: float, label: str) -> str:
    return (
        f'<path class="grid" d="M{x:.1f} {TOP}V{BOTTOM}"/>'
        f'<text x="{x:.1f}" y="{BOTTOM + 16}" text-anchor="middle">{label}</text>'
    )


def _y_tick(y: float, label: str) -> str:
    return (
        f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )
