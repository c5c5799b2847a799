"""`dots1 convert` with a budget: the file it writes, and what it prints."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import Result

from dots1_local.convert import Budget, Conversion
from dots1_local.engine.engine import Engine
from dots1_local.errors import UsageError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.gguf import GGUFFile
from tests.cli.converting import convert, refused
from tests.micro import edit_json, micro_checkpoint
from tests.quant.made_up import made_up


@pytest.mark.parametrize("options", [[], ["--split-max-size", "4MB"]])
def test_the_file_lands_just_under_the_size(
    tiny: Path, calibration: Path, tmp_path: Path, options: list[str]
) -> None:
    size = 15_000_000  # in types that are quick to encode
    result = convert(
        tiny, "--size", size, "--calibration", calibration, "-o", tmp_path / "out.gguf", "--json",
        *options,
    )  # fmt: skip
    found = json.loads(result.stdout)
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 0.999 * size <= written <= size
    assert found["file_bytes"] == written
    assert found["recipe"] == "measured 15 MB"
    file = GGUFFile.open(found["files"][0])
    assert file.keys["dots1_local.recipe"] == "measured 15 MB"
    predicted = file.keys["dots1_local.predicted_kl_divergence"]
    assert predicted == pytest.approx(found["predicted_kl"])
    assert {tensor.name: tensor.type for tensor in file.tensors} == found["types"]
    with Engine.open(found["files"][0], n_ctx=64, threads=1) as engine:
        assert engine.n_vocab == Checkpoint.open(tiny).config.vocab_size


def test_a_dry_run_can_be_edited_and_handed_back(
    tiny: Path, calibration: Path, tmp_path: Path
) -> None:
    options = ("--dry-run", "--json", "--calibration", calibration)
    planned = json.loads(convert(tiny, "--bpw", 3.5, *options).stdout)
    assert 0.999 * 3.5 <= planned["bpw"] <= 3.5
    assert planned["allocation"]["other_width"]["expert_width"] == 256
    planned["types"]["output.weight"] = "F16"
    (tmp_path / "plan.json").write_text(json.dumps(planned))
    again = json.loads(convert(tiny, "--plan", tmp_path / "plan.json", *options).stdout)
    assert again["types"] == planned["types"]
    assert again["bytes"] > planned["bytes"]
    assert again["predicted_kl"] < planned["predicted_kl"]


def test_a_dry_run_explains_the_types(tiny: Path, calibration: Path) -> None:
    options = ("--calibration", calibration, "--dry-run")
    shown = convert(tiny, "--size", "9MB", *options)
    assert shown.exit_code == 0
    found = json.loads(convert(tiny, "--size", "9MB", *options, "--json").stdout)
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert sum(line[:1] == ["routed"] for line in lines) == 3
    total = next(line for line in lines if line[:1] == ["total"])
    assert total[-2:] == [f"{found['bpw']:.3f}", "100.0%"]
    for move in (*found["allocation"]["upgrades"], *found["allocation"]["downgrades"]):
        name = move["tensor"].removesuffix(".weight")
        assert any(line[:3] == [name, move["before"], move["after"]] for line in lines)
    assert sum(part["nbytes"] for part in found["allocation"]["parts"]) == found["bytes"]
    for says in ("measured 9 MB: ", "predicted KL divergence: ", "256 wide (padded) it would be"):
        assert says in shown.stdout


def test_max_kld_finds_the_smallest_file(tiny: Path, calibration: Path) -> None:
    options = ("--calibration", calibration, "--dry-run", "--json")
    tight = json.loads(convert(tiny, "--max-kld", 0.003, *options).stdout)
    loose = json.loads(convert(tiny, "--max-kld", 0.03, *options).stdout)
    assert 0 < tight["predicted_kl"] <= 0.003
    assert loose["bytes"] < tight["bytes"]


@pytest.mark.parametrize(("option", "unit"), [("--size", "MB"), ("--bpw", "bpw")])
def test_the_smallest_and_largest_size_in_an_error_are_possible(
    tiny: Path, calibration: Path, option: str, unit: str
) -> None:
    def planned(value: float) -> Result:
        number = f"{value}MB" if unit == "MB" else value
        return convert(tiny, option, number, "--calibration", calibration, "--dry-run", "--json")

    said = refused(planned(1000))
    smallest, largest = map(float, re.findall(rf"([0-9.]+) {unit}\b", said)[-2:])
    assert set(json.loads(planned(largest).stdout)["types"].values()) == {"Q8_0", "F32"}
    assert planned(smallest).exit_code == 0
    assert "too small" in refused(planned(0.999 * smallest))


def test_the_least_divergence_in_an_error_is_possible(tiny: Path, calibration: Path) -> None:
    options = ("--calibration", calibration, "--dry-run", "--json")
    least = float(refused(convert(tiny, "--max-kld", 1e-9, *options)).split()[-1])
    found = json.loads(convert(tiny, "--max-kld", least, *options).stdout)
    assert 0.98 * least < found["predicted_kl"] <= least


def test_a_table_of_moves_appears_only_if_there_are_moves(tiny: Path, calibration: Path) -> None:
    options = ("--calibration", calibration, "--dry-run")
    smallest = convert(tiny, "--max-kld", 1000, *options).stdout
    assert "just missed" in smallest
    assert "cheapest to give up" not in smallest
    found = json.loads(convert(tiny, "--max-kld", 1000, *options, "--json").stdout)
    assert f"{found['file_bytes']:,} bytes with headers" in smallest


def test_the_allocator_keeps_overrides_and_padding(tiny: Path, calibration: Path) -> None:
    found = json.loads(
        convert(
            tiny, "--size", "9MB", "--calibration", calibration, "--dry-run", "--json",
            "--tensor-type", "attn_v=Q8_0", "--pad-experts", "on",
        ).stdout
    )  # fmt: skip
    assert found["expert_width"] == 256
    assert found["types"]["blk.3.attn_v.weight"] == "Q8_0"


def test_importance_comes_from_the_folder(tiny: Path, calibration: Path, tmp_path: Path) -> None:
    options = ("--type", "DQ2", "--dry-run", "--json")
    with_folder = json.loads(convert(tiny, *options, "--calibration", calibration).stdout)
    with_file = json.loads(convert(tiny, *options, "--imatrix", tiny / "imatrix.gguf").stdout)
    expected = made_up(Checkpoint.open(tiny).config).predict(with_file["types"])
    assert with_file["predicted_kl"] is None
    assert with_folder.pop("file_bytes") > with_file.pop("file_bytes")  # it says so in a key
    assert with_folder == {**with_file, "predicted_kl": expected}
    assert "imatrix.gguf: No such file" in refused(
        convert(tiny, *options, "--calibration", tmp_path)
    )
    unmeasured = convert(tiny, "--type", "Q4_0", "--dry-run", "--calibration", calibration)
    assert "KL divergence is not predicted" in unmeasured.stderr
    assert "KL divergence" not in unmeasured.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--size", "1MB"],
            r"1 MB is too small: .*6\.\d+ MB.* MB",
        ),
        (["--size", "1GB"], r"1 GB is too large: .*6\.\d+ MB"),
        (["--bpw", "1.5"], r"1\.5 bpw is too small: .*\d\.\d+ bpw"),
        (["--max-kld", "1e-9"], "KL divergence of 1e-09"),
        (["--bpw", "nan"], "not nan"),
        (["--max-kld", "-1"], "not -1"),
        (["--size", "x"], "'x'"),
        (["--size", "9MB", "--bpw", "3"], "--size, --bpw"),
        (["--size", "9MB", "--type", "DQ4"], "--type and --plan"),
        (["--size", "9MB", "--context", "4k"], "--context .*--fit-memory"),
    ],
)
def test_impossible_budgets_are_refused(
    tiny: Path, calibration: Path, options: list[str], says: str
) -> None:
    result = convert(tiny, *options, "--calibration", calibration, "--dry-run")
    assert re.search(says, " ".join(refused(result).replace("│", " ").split()))


def test_a_budget_needs_a_calibration_of_the_same_model(
    tiny: Path, calibration: Path, tmp_path: Path
) -> None:
    assert "--calibration" in refused(convert(tiny, "--size", "9MB", "--dry-run"))
    folder = shutil.copytree(calibration, tmp_path / "other")
    edit_json(folder / "sensitivity.json", lambda content: content.update(imatrix="1" * 64))
    options = ("--size", "9MB", "--dry-run", "--calibration", folder)
    assert "another importance file" in refused(convert(tiny, *options))
    meant = convert(tiny, *options, "--imatrix", folder / "imatrix.gguf")
    assert meant.exit_code == 0
    assert "another importance file than imatrix.gguf" in meant.stderr
    assert "none" in refused(
        convert(tiny, "--size", "9MB", "--dry-run", "--calibration", tmp_path / "none")
    )
    (folder / "sensitivity.json").unlink()
    assert "sensitivity.json" in refused(convert(tiny, *options))
    micro = micro_checkpoint(tmp_path / "micro")
    result = convert(micro, "--size", "9MB", "--dry-run", "--calibration", calibration)
    assert "hidden_size is 256" in refused(result)


@pytest.mark.parametrize("shard", [300_000, 700_000])
def test_a_size_includes_the_headers_of_all_shards(
    tiny: Path, calibration: Path, shard: int
) -> None:
    conversion = Conversion.allocate(
        tiny, Budget("size", 9e6), calibration=calibration, split_max_size=shard
    )
    assert 0.999 * 9e6 <= conversion.file_bytes(shard) <= 9e6
    assert conversion.file_bytes(shard) > conversion.file_bytes()


def test_from_python(tiny: Path, calibration: Path) -> None:
    conversion = Conversion.allocate(tiny, Budget("weights", 8e6), calibration=calibration)
    assert 0.999 * 8e6 <= conversion.nbytes <= 8e6
    assert conversion.allocation is not None
    assert conversion.plan == conversion.allocation.plan
    again = Conversion.allocate(tiny, Budget("weights", 8e6), calibration=calibration)
    assert (again.plan, again.predicted_kl) == (conversion.plan, conversion.predicted_kl)
    everything = Conversion.allocate(tiny, Budget("weights", 1e12), calibration=calibration)
    assert set(everything.plan.types.values()) == {"Q8_0", "F32"}
    with pytest.raises(UsageError, match=r"budget .*above 0"):
        Budget("size", 0)


def test_fit_memory_chooses_types(tiny: Path, calibration: Path) -> None:
    options = ("--calibration", calibration, "--dry-run", "--json", "--fit-memory")
    result = convert(tiny, *options, "8GB ram", "--context", "1k", "--kv-type", "q8_0")
    assert set(json.loads(result.stdout)["types"].values()) == {"Q8_0", "F32"}
    assert "KV cache for 1,024 tokens (q8_0)" in result.stderr
    assert "GB stay free" in result.stderr
    whole = convert(tiny, *options, "8GB ram")
    assert "KV cache for 2,048 tokens (f16)" in whole.stderr  # what it was trained for
    described = convert(tiny, *options, "24gb-64gb")  # 24 GiB and 64 GiB, less what is in use
    assert "24.9 GB gpu + " in described.stderr
    assert "'8'" in refused(convert(tiny, *options, "8"))


@pytest.mark.parametrize("budget", [("--bpw", 5), ("--max-kld", 0.02), ("--size", "12MB")])
def test_one_layout_gives_each_matrix_of_experts_one_type(
    tiny: Path, calibration: Path, budget: tuple[str, object]
) -> None:
    options = (*budget, "--calibration", calibration, "--dry-run")
    result = convert(tiny, *options, "--one-layout", "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    one = json.loads(result.stdout)
    free = json.loads(convert(tiny, *options, "--json").stdout)
    for part in ("gate", "up", "down"):
        assert len({k for n, k in one["types"].items() if f"ffn_{part}_exps" in n}) == 1
    own = one["allocation"]["own_types"]
    assert own["kl"] == free["predicted_kl"]
    assert free["allocation"]["own_types"] is None
    shown = convert(tiny, *options, "--one-layout").stdout
    assert "with its own type in each layer it would be" in shown
    assert "its own type" not in convert(tiny, *options).stdout


@pytest.mark.parametrize(
    "options", [("--for", "24gb-64gb"), ("--type", "DQ4"), ("--for", "24gb-64gb", "--size", "9MB")]
)
def test_one_layout_needs_a_budget_of_bytes_or_quality(
    tiny: Path, calibration: Path, options: tuple[str, ...]
) -> None:
    sentence = refused(
        convert(tiny, *options, "--one-layout", "--calibration", calibration, "--dry-run")
    )
    assert "--one-layout" in sentence
    assert "--max-kld" in sentence
