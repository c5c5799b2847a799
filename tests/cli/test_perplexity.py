import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from dots1_local.cli import app
from tests.goldens import make_kld_goldens as goldens
from tests.helpers import CONFIG, write_random_gguf


def test_prints_the_line_llama_perplexity_prints(tmp_path: Path) -> None:
    zeros = np.zeros((CONFIG.vocab_size, CONFIG.hidden_size), np.float32)
    model = write_random_gguf(tmp_path / "model.gguf", tensors={"output.weight": zeros})
    (tmp_path / "text.txt").write_text("abc" * 100)
    command = ["perplexity", str(model), "-f", str(tmp_path / "text.txt"), "-c", "64", "-t", "1"]
    result = CliRunner().invoke(app, command)
    assert result.stdout == "Final estimate: PPL = 268.0000 +/- 0.00000\n"
    as_json = json.loads(CliRunner().invoke(app, [*command, "--json", "--chunks", "2"]).stdout)
    assert (as_json["chunks"], as_json["n_ctx"], as_json["tokens"]) == (2, 64, 62)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["perplexity", *map(str, arguments)])


def test_prints_the_statistics_llama_perplexity_prints(tmp_path: Path) -> None:
    model = goldens.write_model(tmp_path / "noisy.gguf", noisy=True)
    printed = goldens.PRINTED.read_text(encoding="utf-8")
    result = run(model, "--logits", goldens.BASE, "-t", 1)
    assert (result.stdout, result.stderr) == (printed, "")
    drawn = run(model, "--logits", goldens.BASE, "-t", 1, "--histogram").stdout
    assert drawn.startswith(printed + "\nKL divergence tokens\n")
    assert max(map(len, drawn.splitlines())) <= 80


def test_saves_logits_and_compares_with_them_or_with_the_model(tmp_path: Path) -> None:
    base = goldens.write_model(tmp_path / "base.gguf", noisy=False)
    noisy = goldens.write_model(tmp_path / "noisy.gguf", noisy=True)
    text, saved = tmp_path / "text.txt", tmp_path / "base.kld"
    text.write_text(goldens.text() + "\n", encoding="utf-8")
    common = ["-f", text, "-c", 64, "-t", 1]
    result = run(base, *common, "--save-logits", saved)
    assert result.stdout == goldens.ESTIMATE.read_text()
    assert result.stderr == f"wrote {saved} (68.5 kB)\n"
    assert saved.read_bytes() == goldens.BASE.read_bytes()
    assert "exists; give --force" in str(run(base, *common, "--save-logits", saved).exception)
    assert run(base, *common, "--save-logits", saved, "--force").exit_code == 0
    by_model = run(noisy, *common, "--reference", base)
    assert by_model.stdout == goldens.PRINTED.read_text(encoding="utf-8")


def test_json_holds_every_figure_that_is_printed(tmp_path: Path) -> None:
    model = goldens.write_model(tmp_path / "noisy.gguf", noisy=True)
    result = json.loads(run(model, "--logits", goldens.BASE, "-t", 1, "--json").stdout)
    printed = goldens.PRINTED.read_text(encoding="utf-8")
    assert (result["tokens"], result["chunks"], result["n_ctx"]) == (124, 4, 64)
    for key in ("perplexity", "base_perplexity", "log_ratio", "ratio", "difference"):
        assert f"{result[key]['value']:10.6f} ± {result[key]['error']:10.6f}" in printed
    assert f"Mean    KLD: {result['kl_divergence']['value']:10.6f}" in printed
    assert f"99.9%   KLD: {result['kl_percentiles']['99.9']:10.6f}" in printed
    assert f"Minimum Δp: {100 * result['delta_p_percentiles']['0.0']:6.3f}%" in printed
    assert f"RMS Δp    : {100 * result['delta_p_rms']['value']:6.3f}" in printed
    assert f"Same top p: {100 * result['same_top']['value']:6.3f}" in printed


def test_warns_of_few_tokens(tmp_path: Path) -> None:
    model = goldens.write_model(tmp_path / "noisy.gguf", noisy=True)
    result = run(model, "--logits", goldens.BASE, "-t", 1, "--chunks", 2)
    assert result.stderr.startswith("only 62 tokens were scored")
    assert "Median  KLD" in result.stdout


def test_undefined_figures_are_null_in_json(tmp_path: Path) -> None:
    model = write_random_gguf(tmp_path / "model.gguf")
    (tmp_path / "text.txt").write_text("abc" * 100)
    common = ["-f", tmp_path / "text.txt", "-c", 8, "--chunks", 1, "-t", 1]
    result = run(model, *common, "--reference", model, "--json")
    assert json.loads(result.stdout)["correlation"] is None


def test_an_overconfident_model_has_infinite_perplexity(tmp_path: Path) -> None:
    head = 1e4 * np.random.default_rng(0).normal(size=(CONFIG.vocab_size, CONFIG.hidden_size))
    model = write_random_gguf(
        tmp_path / "model.gguf", tensors={"output.weight": head.astype(np.float32)}
    )
    (tmp_path / "text.txt").write_text("abc" * 100)
    command = [model, "-f", tmp_path / "text.txt", "-c", 64, "-t", 1]
    assert run(*command).stdout.startswith("Final estimate: PPL = inf +/- ")
    assert json.loads(run(*command, "--json").stdout)["value"] is None
    by_model = run(*command, "--reference", model, "--json")
    assert json.loads(by_model.stdout)["perplexity"]["value"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name the text to predict"),
        (["-f", "t", "--logits", "a", "--reference", "b"], "give one of"),
        (["-f", "t", "--logits", "a"], "leave out -f"),
        (["-f", "t", "--reference", "b", "--save-logits", "c"], "give one of"),
        (["-f", "t", "--histogram"], "--histogram goes with"),
        (["--logits", "a", "--histogram", "--json"], "--histogram goes with"),
    ],
)
def test_contradictory_options_are_refused(options: list[str], message: str) -> None:
    result = run("model.gguf", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
