"""A picture of a front: KL divergence by the seconds of a turn, in SVG for light and dark pages."""

from xml.sax.saxutils import escape

from dots1_local.chart import LINE, LogAxis, chart, polyline
from dots1_local.fit.front import Fit
from dots1_local.fit.search import MachineFile
from dots1_local.sizes import human_bytes

__all__ = ["picture"]

_STYLE = f"""
.front {{ fill: none; stroke: {LINE}; stroke-width: 2; }}
.file {{ fill: {LINE}; }}
.chosen {{ fill: none; stroke: {LINE}; stroke-width: 2; }}
"""


def picture(found: Fit) -> str:
    """Draw the front on logarithmic axes; the chosen file has a ring, and each a tooltip."""
    files = found.front
    x_axis = LogAxis(file.turn for file in files)
    y_axis = LogAxis((file.kl for file in files), upright=True)
    points = [(x_axis.at(file.turn), y_axis.at(file.kl)) for file in files]
    x, y = points[files.index(found.chosen)]
    tokens = f"{found.turn.prompt:,} tokens read and {found.turn.answer:,} written"
    drawn = [
        polyline("front", points),
        *(_dot(x, y, file) for (x, y), file in zip(points, files, strict=True)),
        f'<circle class="chosen" cx="{x:.1f}" cy="{y:.1f}" r="8"/>',
    ]
    return chart(
        f"Files for {found.machine}",
        x_axis,
        f"seconds of a turn, {tokens}",
        y_axis,
        "predicted KL divergence, nats a token",
        _STYLE,
        drawn,
    )


def _dot(x: float, y: float, file: MachineFile) -> str:
    what = (
        f"{human_bytes(file.nbytes)}, KL divergence {file.kl:.4f}, {1 / file.decode:.1f} tok/s, "
        f"{file.turn:.1f} s"
    )
    circle = f'<circle class="file" cx="{x:.1f}" cy="{y:.1f}" r="4">'
    return f"{circle}<title>{escape(what)}</title></circle>"
