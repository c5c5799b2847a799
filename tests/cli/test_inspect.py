import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dots1_local.cli import app
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
