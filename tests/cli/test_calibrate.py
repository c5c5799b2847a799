import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from dots1_local.cli import app
from dots1_local.quant.imatrix_file import load_importance
from tests.conftest import Converted
from tests.micro import edit_json, micro_checkpoint


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments), "-t", "1"])


def perplexity(*arguments: object) -> dict[str, dict[str, float]]:
    command = ["perplexity", *map(str, arguments), "-t", "1", "--json"]
    return dict(json.loads(CliRunner().invoke(app, command).stdout))


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_checkpoint(tmp_path_factory.mktemp("micro"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a small model. " * 40)
    return path


def test_convert_takes_the_importance_that_is_written(
    micro: Path, text: Path, tmp_path: Path
) -> None:
    result = run(micro, "-f", text, "-f", text, "-o", tmp_path / "out", "-c", 32)
    assert result.exit_code == 0
    importance = load_importance(tmp_path / "out" / "imatrix.gguf")
    assert importance.datasets == ("text.txt", "text.txt")
    assert not importance.partial
    header, row = (line.split() for line in result.stdout.splitlines())
    assert header == ["layer", "experts", "unseen", "under", "100", "fewest", "tokens", "median"]
    assert row[:2] == ["1", "4"]
    command = ["convert", str(micro), "-o", str(tmp_path / "x.gguf"), "--type", "DQ2"]
    options = ["--imatrix", str(tmp_path / "out" / "imatrix.gguf")]
    assert CliRunner().invoke(app, [*command, *options]).exit_code == 0


def test_the_text_may_be_piped_in(micro: Path, text: Path, tmp_path: Path) -> None:
    assert run(micro, "-f", text, "-o", tmp_path / "a", "-c", 32).exit_code == 0
    command = [sys.executable, "-m", "dots1_local", "calibrate", str(micro), "-f", "-", "-c", "32"]
    subprocess.run([*command, "-o", tmp_path / "b"], input=text.read_bytes(), check=True)
    ours, theirs = (load_importance(tmp_path / name / "imatrix.gguf") for name in "ab")
    for name in ours.tensors:
        np.testing.assert_allclose(ours.sums(name), theirs.sums(name), rtol=1e-6)


def test_logits_are_those_of_the_unquantised_gguf(
    tiny: Path, converted: Converted, tmp_path: Path
) -> None:
    """llama.cpp computes the same logits from the F32 file as torch from the checkpoint."""
    base = tmp_path / "base.kld"
    result = run(tiny, "-o", tmp_path / "out", "--logits", base, "--logits-text",
                 tiny / "heldout.txt", "--logits-chunks", 2, "-c", 256)  # fmt: skip
    assert result.stderr.splitlines() == [f"wrote {base} (2.1 MB)"]
    found = perplexity(converted("F32"), "--logits", base)
    assert abs(found["kl_divergence"]["value"]) < 1e-4
    assert found["same_top"]["value"] > 0.99


def test_scripts_get_coverage_as_json(micro: Path, text: Path, tmp_path: Path) -> None:
    result = run(micro, "-f", text, "-o", tmp_path / "out", "-c", 32, "--chunks", 2, "--json")
    found = json.loads(result.stdout)
    assert found["imatrix"] == str(tmp_path / "out" / "imatrix.gguf")
    assert found["sensitivity"] == str(tmp_path / "out" / "sensitivity.json")
    assert (found["tokens"], found["logits"]) == (64, None)
    (layer,) = found["layers"]
    assert (layer["layer"], layer["experts"], layer["rare"]) == (1, 4, 4)
    result = run(micro, "-f", text, "-o", tmp_path / "only", "-c", 32, "--json",
                 "--importance-only")  # fmt: skip
    assert json.loads(result.stdout)["sensitivity"] is None
    assert not (tmp_path / "only" / "sensitivity.json").exists()


def test_refining_writes_two_more_files(micro: Path, text: Path, tmp_path: Path) -> None:
    result = run(micro, "-f", text, "-o", tmp_path / "out", "-c", 32, "--refine", "--json")
    found = json.loads(result.stdout)
    names = {
        "imatrix": "imatrix.gguf",
        "sensitivity": "sensitivity.json",
        "routing": "routing.safetensors",
        "refinement": "refinement.safetensors",
        "refined_sensitivity": "sensitivity-refined.json",
    }
    assert {key: found[key] for key in names} == {
        key: str(tmp_path / "out" / name) for key, name in names.items()
    }
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {*names.values(), "calibration.json"}
    assert all(name in result.stderr for name in set(names.values()) - {"routing.safetensors"})


def test_refining_tells_how_many_tokens_it_needs(micro: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("-f", text, "-o", tmp_path / "out", "-c", 16, "--chunks")
    result = run(micro, *arguments, 3, "--refine")
    assert "has 48 tokens" in str(result.exception)
    assert not (tmp_path / "out").exists()
    result = run(micro, *arguments, 4, "--refine")
    assert result.stderr.startswith("64 tokens of calibration are 0.50 for each column")


def test_refining_needs_a_text_and_both_passes(micro: Path, text: Path, tmp_path: Path) -> None:
    logits = ["--logits", tmp_path / "base.kld", "--logits-text", text]
    result = run(micro, *logits, "-o", tmp_path / "out", "--refine")
    assert (result.exit_code, "--refine" in result.stderr) == (2, True)
    result = run(micro, "-f", text, "-o", tmp_path / "out", "--refine", "--importance-only")
    assert (result.exit_code, "--importance-only" in result.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_model_without_experts_has_no_coverage(tmp_path: Path, text: Path) -> None:
    checkpoint = micro_checkpoint(tmp_path / "hf", first_k_dense_replace=2)
    result = run(checkpoint, "-f", text, "-o", tmp_path / "out", "-c", 32)
    assert (result.exit_code, result.stdout) == (0, "")


def test_warns_of_experts_that_saw_few_tokens(micro: Path, text: Path, tmp_path: Path) -> None:
    result = run(micro, "-f", text, "-o", tmp_path / "out", "-c", 32, "--chunks", 1)
    assert "4 of 4 experts saw fewer than 100 tokens" in result.stderr
    result = run(micro, "-f", text, "-o", tmp_path / "out", "-c", 32, "--chunks", 1,
                 "--shrink-below", 0, "--force", "--importance-only")  # fmt: skip
    assert result.stderr == f"wrote {tmp_path / 'out' / 'imatrix.gguf'} from 32 tokens\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "{} has no chat template, which --chat needs"),
        ("{{ raise_exception('no') }}", "the chat template of {} fails"),
    ],
)
def test_checkpoints_without_a_usable_chat_template(
    tmp_path: Path, template: str | None, message: str
) -> None:
    checkpoint, path = micro_checkpoint(tmp_path / "hf"), tmp_path / "chat.jsonl"
    edit_json(checkpoint / "tokenizer_config.json", lambda c: c.update(chat_template=template))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": messages}))
    result = run(checkpoint, "--chat", path, "-o", tmp_path / "out")
    assert message.format(checkpoint) in str(result.exception)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 tokens; a context of 512 needs 1024 or more"),
        (b"Too short.", "tokens; a context of 512 needs 1024 or more"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (None, "cannot read"),
    ],
)
def test_texts_that_cannot_be_used(
    micro: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    result = run(micro, "-f", path, "-o", tmp_path / "out")
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line",
    ["junk", "[]", "{}", '{"messages": []}', '{"messages": [{"role": "user", "content": "a"}]}',
     '{"messages": [{"role": "pope", "content": "a"}, {"role": "assistant", "content": "b"}]}',
     '{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "b"}]}'],
)  # fmt: skip
def test_lines_that_are_not_conversations(micro: Path, tmp_path: Path, line: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(line)
    result = run(micro, "--chat", path, "-o", tmp_path / "out")
    assert "line 1" in str(result.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name a text to calibrate on"),
        (["--logits", "base.kld"], "go together"),
        (["-f", "t", "--logits-text", "u"], "go together"),
    ],
)
def test_contradictory_options_are_refused(options: list[str], message: str) -> None:
    result = run("checkpoint", "-o", "out", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_without_torch_it_says_what_to_install(
    micro: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run(micro, "-f", text, "-o", tmp_path / "out")
    assert "pip install 'dots1-local[torch]'" in str(result.exception)


def test_an_existing_result_is_kept(micro: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "imatrix.gguf").write_text("precious")
    base = tmp_path / "base.kld"
    common = ["-f", text, "-o", output, "-c", 32]
    assert "--force" in str(run(micro, *common).exception)
    base.write_text("precious")
    (output / "imatrix.gguf").unlink()
    result = run(micro, *common, "--logits", base, "--logits-text", text)
    assert "--force" in str(result.exception)
    assert base.read_text() == "precious"
    assert not list(output.iterdir())
