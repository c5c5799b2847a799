"""The README's table of mixes by machine: size, KL divergence, predicted speed.

    python -m tools.machine_table

It replaces what stands between `<!-- machines -->` and `<!-- /machines -->` in README.md. Each mix
is laid out at dots.llm1's full geometry (a header over a sparse file), and `dots1 plan` plans it
for the machines that come with the package. KL divergence is the example's, from
`benchmarks/mixes.md`.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from typer.testing import CliRunner

from dots1_local.cli import app
from tools.doc_block import replace_block
from tools.make_gguf import write_gguf
from tools.make_wide import published_config

__all__ = ["MIXES", "cell", "render"]

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MACHINES = ("24gb-64gb", "24gb-128gb", "2x24gb-128gb", "12gb-96gb", "cpu-96gb")
# Name, recipe, with an importance matrix or without.
MIXES = (
    ("DQ2", "DQ2", False),
    ("DQ2 + imatrix", "DQ2", True),
    ("DQ3", "DQ3", False),
    ("DQ3 + imatrix", "DQ3", True),
    ("DQ4", "DQ4", False),
    ("DQ5", "DQ5", False),
    ("DQ6", "DQ6", False),
)


def render(context: str = "16k") -> str:
    """The table in Markdown, a mix a line."""
    divergences = dict(_divergences((ROOT / "benchmarks" / "mixes.md").read_text(encoding="utf-8")))
    rows = [_row("mix", "size", "KL divergence", *MACHINES)]
    rows.append(_row(*["---"] * (3 + len(MACHINES))))
    with TemporaryDirectory() as folder:
        for name, recipe, importance in MIXES:
            path = Path(folder) / f"{recipe}.gguf"
            write_gguf(path, published_config(), recipe, importance=importance, headers_only=True)
            size = f"{path.stat().st_size / 1e9:.1f} GB"
            cells = [cell(path, machine, context) for machine in MACHINES]
            rows.append(_row(name, size, divergences[name], *cells))
    return "".join(rows)


def cell(path: Path, machine: str, context: str) -> str:
    """Predicted tokens a second: of an answer, and of a prompt; a dash where it does not fit."""
    arguments = ["plan", str(path), "--hardware", machine, "--context", context, "--json"]
    result = CliRunner().invoke(app, arguments)
    if "does not fit" in result.stderr:
        return "–"
    if result.exit_code:
        sys.exit(result.stderr)
    predicted: dict[str, Any] = json.loads(result.stdout)["predicted"]
    first = predicted["speeds"][0]
    return f"{first['decode']:.1f} / {first['prefill']:.0f}"


def _divergences(page: str) -> Iterator[tuple[str, str]]:
    """The KL divergence of each mix in `benchmarks/mixes.md`."""
    heading = ""
    for line in page.splitlines():
        if line.startswith("## "):
            heading = line
        match = re.match(r"\| (DQ\d)[^|]* \|.*\| (\d\.\d+) ± \S+ \|$", line)
        if match:
            suffix = " + imatrix" if "With an" in heading else ""
            yield match[1] + suffix, f"{float(match[2]):.4f}"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
    replace_block(README, "machines", render())
