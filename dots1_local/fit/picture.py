"""A picture of a front: KL divergence by the seconds of a turn, in SVG for light and dark pages."""

from math import ceil, floor, log10
from xml.sax.saxutils import escape

from dots1_local.fit.front import Fit
from dots1_local.fit.search import MachineFile
from dots1_local.sizes import human_bytes

__all__ = ["picture"]

_WIDTH, _HEIGHT = 560, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 24, 56, 52
_INK, _LINE = "#768390", "#2f81f7"  # as far from white as from near-black
_STYLE = f"""
text {{ font: 12px system-ui, sans-serif; fill: {_INK}; }}
.title {{ font-size: 14px; font-weight: 600; }}
.grid {{ stroke: {_INK}; stroke-opacity: .22; }}
.front {{ fill: none; stroke: {_LINE}; stroke-width: 2; }}
.file {{ fill: {_LINE}; }}
.chosen {{ fill: none; stroke: {_LINE}; stroke-width: 2; }}
"""


def picture(found: Fit) -> str:
    """Draw the front on logarithmic axes; the chosen file has a ring, and each a tooltip."""
    files = found.front
    x_axis = _Axis([file.turn for file in files], _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis([file.kl for file in files], _HEIGHT - _BOTTOM, _TOP)
    points = [(x_axis.at(file.turn), y_axis.at(file.kl)) for file in files]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[files.index(found.chosen)]
    title = escape(f"Files for {found.machine}")
    tokens = f"{found.turn.prompt:,} tokens read and {found.turn.answer:,} written"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}">',
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="{_LEFT}" y="22">{title}</text>',
        f'<text x="{_LEFT}" y="40">predicted KL divergence, nats a token</text>',
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 10}" text-anchor="end">'
        f"seconds of a turn, {tokens}</text>",
        *(_x_tick(x_axis.at(value), value) for value in x_axis.ticks()),
        *(_y_tick(y_axis.at(value), value) for value in y_axis.ticks()),
        f'<polyline class="front" points="{path}"/>',
        *(_dot(x, y, file) for (x, y), file in zip(points, files, strict=True)),
        f'<circle class="chosen" cx="{x:.1f}" cy="{y:.1f}" r="8"/>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


class _Axis:
    """A logarithmic axis that shows all of `values` between two pixels."""

    def __init__(self, values: list[float], start: float, end: float) -> None:
        low, high = log10(min(values)), log10(max(values))
        margin = max(0.05 * (high - low), 0.02)
        self._low, self._high = low - margin, high + margin
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        share = (log10(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Round values on the axis: 1, 2 and 5 times powers of ten, or all digits if few fit."""
        powers = range(floor(self._low), ceil(self._high) + 1)
        for digits in ((1, 2, 5), range(1, 10), [n / 10 for n in range(10, 100)]):
            found = [d * 10.0**power for power in powers for d in list(digits)]
            shown = [value for value in found if self._low <= log10(value) <= self._high]
            if len(shown) >= 3:
                break
        return shown


def _x_tick(x: float, value: float) -> str:
    return (
        f'<path class="grid" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
        f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
    )


def _y_tick(y: float, value: float) -> str:
    return (
        f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    )


def _dot(x: float, y: float, file: MachineFile) -> str:
    what = (
        f"{human_bytes(file.nbytes)}, KL divergence {file.kl:.4f}, {1 / file.decode:.1f} tok/s, "
        f"{file.turn:.1f} s"
    )
    circle = f'<circle class="file" cx="{x:.1f}" cy="{y:.1f}" r="4">'
    return f"{circle}<title>{escape(what)}</title></circle>"
