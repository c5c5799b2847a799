import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from dots1_local.calibrate.calibrate import calibrate
from dots1_local.cli import app
from dots1_local.errors import Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from tests.calibrate.calibration import random_tokens
from tests.helpers import CONFIG, TOKENS, random_tensors, write_random_gguf
from tests.micro import micro_checkpoint

PARAMETERS = sum(tensor.size for tensor in random_tensors().values())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("inspect") / "model.gguf")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def row(output: str, start: str) -> list[str]:
    (line,) = (line for line in output.splitlines() if line.startswith(start))
    return line.split()


def test_sums_up_by_role(model: Path) -> None:
    output = run(model)
    experts = 2 * 3 * CONFIG.n_routed_experts * CONFIG.hidden_size * CONFIG.moe_intermediate_size
    assert row(output, "routed")[:4] == ["routed", "F32", "6", f"{experts:,}"]
    assert row(output, "total")[1:3] == ["46", f"{PARAMETERS:,}"]
    assert "\x1b" not in output


def test_lists_tensors_and_keys(model: Path) -> None:
    output = run(model, "--tensors", "--keys")
    assert row(output, "blk.1.ffn_down_exps.weight")[1:4] == ["routed", "F32", "8×64×32"]
    assert f"{len(TOKENS)} in all]" in " ".join(row(output, "tokenizer.ggml.tokens"))
    assert row(output, "general.architecture")[1] == '"dots1"'


def test_json_has_everything(model: Path) -> None:
    found = json.loads(run(model, "--json"))
    assert found["parameters"] == PARAMETERS
    assert found["bytes"] == 4 * PARAMETERS
    assert found["bpw"] == 32
    assert sum(role["bytes"] for role in found["roles"].values()) == 4 * PARAMETERS
    assert found["keys"]["tokenizer.ggml.tokens"] == TOKENS
    assert found["tensors"][0] == {
        "name": "token_embd.weight", "role": "embedding", "type": "F32",
        "shape": [CONFIG.vocab_size, CONFIG.hidden_size],
        "parameters": CONFIG.vocab_size * CONFIG.hidden_size,
        "nbytes": 4 * CONFIG.vocab_size * CONFIG.hidden_size, "file": "model.gguf",
    }  # fmt: skip


def test_a_split_file_is_one_model(tmp_path: Path) -> None:
    write_random_gguf(tmp_path / "model.gguf", shard_tensors=12)
    found = json.loads(run(sorted(tmp_path.iterdir())[1], "--json"))
    assert found["parameters"] == PARAMETERS
    assert len(found["files"]) == 4


def test_a_checkpoint_has_the_same_roles(tmp_path: Path) -> None:
    folder = micro_checkpoint(tmp_path / "micro", shards=2)
    found = json.loads(run(folder, "--json"))
    assert found["kind"] == "checkpoint"
    assert found["keys"]["model_type"] == "dots1"
    # 1 MoE layer with 4 experts of 3 matrices, 64 × 32 weights each, in BF16.
    assert found["roles"]["routed"] == {"tensors": 12, "parameters": 24576, "bytes": 49152}
    assert "other" not in found["roles"]
    assert row(run(folder), "routed")[1] == "BF16"


def test_an_unreadable_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing of the kind")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "x.gguf")])
    assert result.exit_code != 0
    assert "not a GGUF file" in str(result.exception)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    checkpoint = Checkpoint.open(micro_checkpoint(folder / "hf", num_hidden_layers=4))
    calibrate(checkpoint, folder / "out", random_tokens(6), threads=1, sensitivity=False)
    return folder / "out"


def test_a_calibration_shows_what_caches_hit(calibrated: Path) -> None:
    output = run(calibrated)
    assert "2 of 4 experts per token in 3 layers, 192 tokens, 192 of them traced" in output
    header = "layer top 1 effective LRU 1 LRU 2 LRU 3 hot 1 hot 2 hot 3"
    assert row(output, "layer") == header.split()
    found = json.loads(run(calibrated, "--json"))
    assert (found["kind"], found["experts"], found["sizes"]) == ("calibration", 4, [1, 2, 3])
    assert [layer["layer"] for layer in found["layers"]] == [1, 2, 3]
    shown = [float(cell.rstrip("%")) for cell in row(output, "  all")[3:]]
    mean = [*found["mean"]["lru"], *found["mean"]["static"]]
    np.testing.assert_allclose(shown, 100 * np.array(mean), atol=0.051)


def test_hit_rates_are_drawn(calibrated: Path, tmp_path: Path) -> None:
    run(calibrated, "--svg", tmp_path / "hits.svg")
    picture = ElementTree.parse(tmp_path / "hits.svg")
    lines = picture.findall("{http://www.w3.org/2000/svg}polyline")
    titles = [line[0].text for line in lines if len(line)]
    assert {f"layer {layer}" for layer in (1, 2, 3)} < set(titles)
    # 0, three sizes and all experts, in a picture of 560 x 380
    for line in lines[:5]:
        points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        assert len(points) == 5
        assert all(0 < x < 560 and 0 < y < 380 for x, y in points)
        assert points == sorted(points, key=lambda point: (point[0], -point[1]))


def test_an_old_calibration_has_no_routing(calibrated: Path, tmp_path: Path) -> None:
    old = shutil.copytree(calibrated, tmp_path / "old")
    (old / "routing.safetensors").unlink()
    result = CliRunner().invoke(app, ["inspect", str(old)])
    assert isinstance(result.exception, Dots1Error)
    assert "calibrate again" in str(result.exception)


def test_only_a_calibration_can_be_drawn(model: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(model), "--svg", str(tmp_path / "x.svg")])
    assert (result.exit_code, "--svg" in result.output) == (2, True)
