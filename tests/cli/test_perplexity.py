import json
import math
import re
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


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Three texts of different lengths, the last one named by its file."""
    for name, text in {"a": "abc" * 100, "b": "hello!" * 40, "c": "xyz" * 90}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return [f"first={tmp_path}/a.txt", f"二={tmp_path}/b.txt", f"{tmp_path}/c.txt"]


def rows(printed: str) -> dict[str, list[str]]:
    """The cells of a table after its header, by the first cell; cells are two spaces apart."""
    lines = [re.split(" {2,}", line) for line in printed.splitlines()[1:]]
    return {name: cells for name, *cells in lines}


def test_each_text_has_the_digits_that_it_has_alone(tmp_path: Path, texts: list[str]) -> None:
    model = write_random_gguf(tmp_path / "model.gguf")
    common = ["-c", 32, "-t", 1]
    given = [part for text in texts for part in ("-f", text)]
    found = rows(run(model, *given, *common).stdout)
    assert list(found) == ["first", "二", "c", "all"]
    as_json = json.loads(run(model, *given, *common, "--json").stdout)
    logs, counts = [], []
    for text, (name, cells) in zip(texts, found.items(), strict=False):
        alone = run(model, "-f", text, *common).stdout
        assert alone == f"Final estimate: PPL = {cells[2]} +/- {cells[3]}\n"
        figures = as_json["texts"][name]
        logs.append(math.log(figures["value"]))
        counts.append(figures["tokens"])
    assert as_json["all"]["tokens"] == sum(counts)
    expected = math.exp(np.average(logs, weights=counts))
    assert as_json["all"]["value"] == pytest.approx(expected, rel=1e-12)
    assert found["all"][2] == f"{expected:.4f}"


def test_each_text_has_its_own_divergence(tmp_path: Path, texts: list[str]) -> None:
    base = goldens.write_model(tmp_path / "base.gguf", noisy=False)
    noisy = goldens.write_model(tmp_path / "noisy.gguf", noisy=True)
    common = ["-t", 1, "-c", 32]
    given = [part for text in texts for part in ("-f", text)]
    by_model = run(noisy, *given, "--reference", base, *common, "--json")
    figures = json.loads(by_model.stdout)
    logits = []
    for number, (text, name) in enumerate(zip(texts, ("first", "二", "c"), strict=True)):
        alone = json.loads(run(noisy, "-f", text, "--reference", base, *common, "--json").stdout)
        assert figures["texts"][name] == alone
        run(base, "-f", text, *common, "--save-logits", tmp_path / f"{number}.kld")
        logits += ["--logits", f"{name}={tmp_path}/{number}.kld"]
    by_file = run(noisy, *logits, "-t", 1)
    again = json.loads(run(noisy, *logits, "-t", 1, "--json").stdout)
    assert again == figures
    tokens = [each["tokens"] for each in figures["texts"].values()]
    means = [each["kl_divergence"]["value"] for each in figures["texts"].values()]
    assert figures["all"]["kl_divergence"]["value"] == pytest.approx(
        np.average(means, weights=tokens), rel=1e-9
    )
    assert f"{means[1]:.6f} ± " in rows(by_file.stdout)["二"][4]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x=", "x="], "two texts of -f are called 'x'"),
        (["", ""], "two texts of -f are called 'text'"),
        (["all=", "x="], "is the name of all texts"),
        (["=", "x="], "must be NAME=FILE"),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    (tmp_path / "text.txt").write_text("abc")
    given = [part for name in names for part in ("-f", f"{name}{tmp_path}/text.txt")]
    error = run("model.gguf", *given).exception
    assert getattr(error, "exit_code", None) == 2
    assert message in str(error)


def test_what_is_for_one_text_is_refused_for_several(tmp_path: Path, texts: list[str]) -> None:
    model = write_random_gguf(tmp_path / "model.gguf")
    given = [part for text in texts for part in ("-f", text)]
    assert "one text" in str(run(model, *given, "--save-logits", tmp_path / "x").exception)
    short = run(model, *given, "-c", 130, "-t", 1)
    assert "二 has 80" in str(short.exception)


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
