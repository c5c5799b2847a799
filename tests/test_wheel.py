"""The package works outside a clone: a wheel of it, in an environment of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    """Run it without this clone on Python's path; return what it prints to stdout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a new environment that has the wheel.

    What the wheel depends on is borrowed from this environment: compiling llama.cpp takes minutes.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    source = folder / "source"  # a copy, as setuptools writes beside pyproject.toml
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dots1_local", source / "dots1_local", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        source,
        cwd=folder,
    )
    [wheel] = folder.glob("dots1_local-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    programs = folder / "venv" / "bin"
    run(*pip, "--python", programs / "python", "install", "--no-deps", wheel, cwd=folder)
    site = run(
        programs / "python",
        "-c",
        "import sysconfig; print(sysconfig.get_path('purelib'))",
        cwd=folder,
    )
    Path(site.strip(), "borrowed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return programs


@pytest.mark.slow
def test_converts_and_chats(installed: Path, tiny: Path, tmp_path: Path) -> None:
    where = run(
        installed / "python", "-c", "import dots1_local; print(dots1_local.__file__)", cwd=tmp_path
    )
    assert where.startswith(str(installed.parent))
    run(installed / "dots1", "convert", tiny, "-o", "tiny.gguf", cwd=tmp_path)
    count = "from dots1_local.serve.http.page import page_routes; print(len(page_routes()))"
    page = [path for path in (ROOT / "dots1_local/serve/page").rglob("*") if path.is_file()]
    assert run(installed / "python", "-c", count, cwd=tmp_path) == f"{len(page)}\n"
    answer = run(
        installed / "dots1", "chat", "tiny.gguf", "-p", "Hello", "--temp", "0", cwd=tmp_path
    )
    assert answer.strip()
    assert "24gb-64gb" in run(
        installed / "dots1", "plan", "tiny.gguf", "--hardware", "24gb-64gb", cwd=tmp_path
    )
