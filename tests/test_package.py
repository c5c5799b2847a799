"""The package as a whole: its public names, and who may print."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dots1_local

PACKAGE = Path(dots1_local.__file__).parent


@pytest.mark.parametrize("name", dots1_local.__all__)
def test_every_public_name_can_be_loaded(name: str) -> None:
    assert getattr(dots1_local, name).__module__.startswith("dots1_local.")


def test_importing_the_package_loads_nothing_else() -> None:
    script = (
        "import sys, dots1_local; print(*[name for name in sys.modules if 'dots1_local.' in name])"
    )
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "\n"


def test_only_the_command_line_prints() -> None:
    for path in PACKAGE.rglob("*.py"):
        calls = (
            node.func.id
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        )
        assert "print" not in calls or "cli" in path.parts, path
