from pathlib import Path

import pytest
from typer.testing import CliRunner

from dots1_local.cli import app
from tests.helpers import EOS, scripted_tensors, tokens_of, write_random_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It answers 中文 to everything."""
    path = tmp_path_factory.mktemp("chat") / "model.gguf"
    return write_random_gguf(path, tensors=scripted_tensors([*tokens_of("中文"), EOS]))


def test_a_prompt_gives_one_answer_on_stdout(model: Path) -> None:
    result = CliRunner().invoke(app, ["chat", str(model), "-p", "hi", "--temp", "0", "-t", "1"])
    assert result.exit_code == 0, result.output
    assert (result.stdout, result.stderr) == ("中文\n", "")


def test_piped_text_is_the_prompt(model: Path) -> None:
    result = CliRunner().invoke(
        app, ["chat", str(model), "--temp", "0", "-t", "1"], input="hi\nthere\n"
    )
    assert result.stdout == "中文\n"


def test_answers_can_be_cut(model: Path) -> None:
    result = CliRunner().invoke(
        app, ["chat", str(model), "-p", "hi", "--temp", "0", "-n", "4", "-t", "1"]
    )
    assert result.stdout == "中\n"


@pytest.mark.parametrize(
    "options", [["--temp", "-1"], ["--top-p", "2"], ["-n", "0"], ["-c", "2000"], ["--threads", "0"]]
)
def test_senseless_options_are_refused(model: Path, options: list[str]) -> None:
    result = CliRunner().invoke(app, ["chat", str(model), "-p", "hi", *options])
    assert result.exit_code != 0
    assert result.stdout == ""
