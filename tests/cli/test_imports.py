"""Verbs do not import what they do not need, so that they start quickly."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import EOS, scripted_tensors, write_random_gguf
from tests.micro import micro_checkpoint
from tests.openai_server import answer, playing

SCRIPT = """
import sys
from dots1_local.cli import app
app(sys.argv[1].split("|"), standalone_mode=False)
heavy = {
    "torch", "transformers", "llama_cpp", "numpy", "rich.table", "jinja2", "gguf", "prompt_toolkit"
}
print(*sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


def loaded_by(*arguments: object) -> set[str]:
    command = "|".join(map(str, arguments))
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, command], capture_output=True, text=True, check=True
    )
    return set(result.stderr.split())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imports") / "model.gguf"
    return write_random_gguf(path, tensors=scripted_tensors([65, EOS]))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["chat", "--help"], ["convert", "--help"], ["calibrate", "--help"]]
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert not loaded_by(*arguments) & {"torch", "transformers", "llama_cpp", "numpy", "gguf"}


def test_inspect_of_a_checkpoint_loads_no_torch(tmp_path: Path) -> None:
    found = loaded_by("inspect", micro_checkpoint(tmp_path / "hf"))
    assert not found & {"torch", "transformers", "llama_cpp"}


def test_inspect_loads_neither_engine_nor_numpy(model: Path) -> None:
    assert loaded_by("inspect", model) == {"rich.table"}


def test_one_answer_loads_neither_torch_nor_an_editor(model: Path) -> None:
    found = loaded_by("chat", model, "-p", "hi", "--temp", "0", "-t", "1")
    assert "llama_cpp" in found
    assert not found & {"torch", "transformers", "gguf", "prompt_toolkit"}


def test_talking_to_a_server_loads_no_engine() -> None:
    with playing(answer("hi")) as server:
        found = loaded_by("chat", "--url", server.url, "-p", "hi")
    assert not found & {"llama_cpp", "numpy", "jinja2", "prompt_toolkit"}


def test_convert_loads_neither_torch_nor_the_engine(tmp_path: Path) -> None:
    source = micro_checkpoint(tmp_path / "hf")
    found = loaded_by("convert", source, "-o", tmp_path / "out.gguf")
    assert "gguf" in found
    assert not found & {"torch", "transformers", "llama_cpp"}


def test_export_loads_neither_torch_nor_the_engine(model: Path, tmp_path: Path) -> None:
    found = loaded_by("export", model, "-o", tmp_path / "out")
    assert not found & {"torch", "transformers", "llama_cpp"}
