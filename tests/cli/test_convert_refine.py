"""`dots1 convert --refine`: from a text to a refined file, what is printed, and what is refused."""

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dots1_local.cli import app
from dots1_local.errors import Dots1Error
from tests.micro import micro_checkpoint

PARTS = {"token_embd", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up",
         "ffn_down", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_shexp",
         "ffn_up_shexp", "ffn_down_shexp", "output"}  # fmt: skip


def convert(*options: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, options)])


def refused(result: Result) -> str:
    """Return the sentence that the command line prints."""
    if isinstance(result.exception, Dots1Error):
        return str(result.exception)
    assert result.exit_code == 2
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_checkpoint(tmp_path_factory.mktemp("micro"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("Once upon a time there was a small model. " * 100)
    return path


@pytest.fixture(scope="module")
def refined(
    micro: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result]:
    """A file that one command made of a text."""
    output = tmp_path_factory.mktemp("refined") / "out.gguf"
    return output, convert(micro, "-o", output, "--refine", "-f", text, "--bpw", 5, "-t", 2)


def test_one_command_from_text_to_file(refined: tuple[Path, Result]) -> None:
    output, result = refined
    assert result.exit_code == 0, result
    names = {path.name for path in output.parent.iterdir()}
    assert names == {"out.gguf", "out.gguf.calibration"}
    table = result.stdout.partition("held out")[2].splitlines()
    rows = [line.split() for line in table if len(line.split()) == 6]
    assert {row[1] for row in rows} <= PARTS
    experts = next(row for row in rows if row[1] == "ffn_up_exps")
    assert experts[2] == "4"
    assert 0 < float(experts[4]) <= 1


def test_inspect_tells_of_refinement(refined: tuple[Path, Result], text: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(refined[0]), "--keys"]).stdout
    assert "refined with" in shown
    assert text.name in shown
    assert "dots1_local.refinement.rounds" in shown


def test_another_size_uses_the_calibration(
    refined: tuple[Path, Result], micro: Path, tmp_path: Path
) -> None:
    folder = refined[0].with_name("out.gguf.calibration")
    common = [micro, "--refine", "--calibration", folder, "--json"]
    result = convert(*common, "--bpw", 5, "-o", tmp_path / "same.gguf")
    found = json.loads(result.stdout)
    assert digest(tmp_path / "same.gguf") == digest(refined[0])
    parts = {part["part"]: part for part in found["refined"]}
    assert parts["ffn_up_exps"]["matrices"] == 4
    dry = convert(*common, "--bpw", 8, "--dry-run")
    assert 5 < json.loads(dry.stdout)["bpw"] <= 8
    assert json.loads(dry.stdout)["predicted_kl"] < found["predicted_kl"]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_another_text_does_not_use_the_calibration(
    refined: tuple[Path, Result], micro: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Something else is in this text, many times over. " * 100)
    result = convert(micro, "-o", refined[0], "--refine", "-f", other, "--force", "--type", "Q8_0")
    assert "out.gguf.calibration" in refused(result)
    assert "--calibration" in refused(result)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--refine"], "-f"),
        (["-f", "t"], "--refine"),
        (["--chat", "t"], "--refine"),
        (["--refine", "-f", "t", "--calibration", "c"], "--calibration"),
        (["--refine", "-f", "t", "--dry-run"], "--calibration"),
        (["--bpw", "4", "--refine"], "-f"),
        (["--refine", "--calibration", "missing"], "missing"),
    ],
)
def test_options_that_contradict_each_other(
    micro: Path, tmp_path: Path, options: list[str], named: str
) -> None:
    result = convert(micro, "-o", tmp_path / "out.gguf", *options)
    assert result.exit_code != 0
    assert named in refused(result)


def test_a_folder_without_refinement_says_how_to_make_it(
    micro: Path, text: Path, tmp_path: Path
) -> None:
    calibrate = ["calibrate", str(micro), "-o", str(tmp_path / "plain"), "-f", str(text),
                 "--importance-only"]  # fmt: skip
    CliRunner().invoke(app, calibrate)
    result = convert(
        micro, "-o", tmp_path / "out.gguf", "--refine", "--calibration", tmp_path / "plain"
    )
    assert "dots1 calibrate --refine" in refused(result)
