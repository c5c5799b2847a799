"""Who may import whom: data goes one way, and only the command line prints."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dots1_local"
# Folder: what it must not import.
FORBIDDEN = {
    "runtime": ("dots1_local.convert", "dots1_local.cli", "torch"),
    "quant": ("dots1_local.convert", "dots1_local.engine", "dots1_local.cli", "torch"),
    "convert": ("dots1_local.engine", "dots1_local.cli", "torch", "llama_cpp"),
    "verify": ("dots1_local.engine", "dots1_local.cli", "torch", "llama_cpp"),
    "evaluate": ("dots1_local.convert", "dots1_local.cli", "torch"),
    "reference": ("dots1_local.convert", "dots1_local.engine", "dots1_local.cli"),
}


def imported(source: ast.AST) -> Iterator[str]:
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


CALIBRATION = ("calibrate.py", "forward.py", "probe.py", "rounding.py")


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_go_one_way(folder: str) -> None:
    for path in (PACKAGE / folder).rglob("*.py"):
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if path.name in CALIBRATION and name.startswith("torch"):
                continue  # loaded by its verb alone
            assert not name.startswith(FORBIDDEN[folder]), f"{path.name} imports {name}"


def test_only_the_command_line_prints() -> None:
    for path in PACKAGE.rglob("*.py"):
        calls = (
            node.func.id
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        )
        assert "print" not in calls or path.parent.name == "cli", path
