"""Draw docs/design.svg: the folders of dots1_local and the imports between them.

    python -m tools.draw_design

The arrows come from the code's own imports (read by grimp), and the captions from the first lines
of the packages' docstrings. An arrow is left out where a longer path already implies it.
"""

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import wrap
from xml.sax.saxutils import escape

import grimp

__all__ = ["imports", "render", "without_implied"]

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "design.svg"
BASE = "architecture"  # the modules beside the folders are drawn as one box

# Folder: (column, row). Data is made on the left and used on the right.
PLACES = {
    "cli": (1.5, 0),
    "evaluate": (2, 1),
    "serve": (2, 2),
    "chat": (2, 3),
    "engine": (2, 4),
    "fit": (3, 1),
    "placement": (2, 5),
    "export": (1, 4),
    "devices": (2, 6),
    "verify": (1, 5),
    "convert": (1, 6),
    "calibrate": (1, 7),
    "hub": (0, 7),
    "refine": (1, 8),
    "reference": (0, 8),
    "quant": (1, 9),
    "files": (1, 10),
    BASE: (1, 11),
}
_WIDTH, _HEIGHT, _COLUMN, _ROW, _MARGIN = 232, 64, 256, 92, 14
_STYLE = """
text { font: 10.5px system-ui, sans-serif; fill: #768390; text-anchor: middle; }
.name { font-size: 14px; font-weight: 600; fill: #2f81f7; }
rect { fill: none; stroke: #768390; rx: 6; }
path { fill: none; stroke: #768390; stroke-width: 1.3; marker-end: url(#head); }
marker path { fill: #768390; stroke: none; }
"""


def imports() -> dict[str, set[str]]:
    """Which folders each folder imports; `BASE` stands for all modules beside the folders."""
    graph = grimp.build_graph("dots1_local", exclude_type_checking_imports=True)
    found: dict[str, set[str]] = {name: set() for name in PLACES}
    for module in graph.modules - {"dots1_local", "dots1_local.__main__"}:
        importer = _folder(module)
        for name in graph.find_modules_directly_imported_by(module) - {"dots1_local"}:
            if _folder(name) != importer:
                found[importer].add(_folder(name))
    return found


def without_implied(edges: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    """The transitive reduction of an acyclic graph, sorted."""

    def reached(start: str) -> set[str]:
        return {x for name in edges[start] for x in (name, *reached(name))}

    return sorted(
        (source, target)
        for source, targets in edges.items()
        for target in targets
        if not any(target in reached(other) for other in targets)
    )


def render() -> str:
    """The picture as SVG."""
    width = 4 * _COLUMN - _COLUMN + _WIDTH + 2 * _MARGIN
    height = 11 * _ROW + _HEIGHT + 2 * _MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" '
        'aria-label="The folders of dots1_local; an arrow means that one imports the other">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z"/></marker></defs>',
        *(_arrow(source, target) for source, target in without_implied(imports())),
        *(line for name in PLACES for line in _box(name)),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _folder(module: str) -> str:
    name = module.split(".")[1]
    if name in PLACES and name != BASE:
        return name
    if (ROOT / "dots1_local" / name).is_dir():
        sys.exit(f"tools/draw_design.py has no place for dots1_local/{name}/; add one to PLACES")
    return BASE


def _corner(name: str) -> tuple[float, float]:
    column, row = PLACES[name]
    return _MARGIN + column * _COLUMN, _MARGIN + row * _ROW


def _arrow(source: str, target: str) -> str:
    x1, y1 = _corner(source)
    x2, y2 = _corner(target)
    x1, x2, y1 = x1 + _WIDTH / 2, x2 + _WIDTH / 2, y1 + _HEIGHT
    if x1 != x2:  # leave and arrive off the middle, where other arrows are
        shift = min(70.0, abs(x2 - x1) / 2) * (1 if x2 > x1 else -1)
        x1, x2 = x1 + shift, x2 - shift
    turn = y2 - _ROW + _HEIGHT  # go straight down, and turn in the gap above the target
    return (
        f'<path d="M{x1:g},{y1:g} V{turn:g} C{x1:g},{y2 - 4:g} {x2:g},{turn + 4:g} {x2:g},{y2:g}"/>'
    )


def _box(name: str) -> list[str]:
    x, y = _corner(name)
    middle = x + _WIDTH / 2
    title = "architecture, errors, …" if name == BASE else f"{name}/"
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}"/>',
        f'<text class="name" x="{middle:g}" y="{y + 18:g}">{title}</text>',
        *(
            f'<text x="{middle:g}" y="{y + 33 + 12 * index:g}">{escape(line)}</text>'
            for index, line in enumerate(wrap(_caption(name), 40, max_lines=3, placeholder="…"))
        ),
    ]


def _caption(name: str) -> str:
    """The first sentence of a package's docstring."""
    if name == BASE:
        return "the model's configuration and inventory; what every folder needs"
    source = (ROOT / "dots1_local" / name / "__init__.py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    return text.splitlines()[0].rstrip(".") if text else ""


if __name__ == "__main__":
    PICTURE.write_text(render(), encoding="utf-8")
