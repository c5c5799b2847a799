"""The real model's 62 layers and 60 shards, planned from headers alone."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dots1_local.cli import app
from tools.make_wide import published_config, write_checkpoint

# Parameters by role, by hand from the published config.json.
ATTENTION = 62 * 4 * 4096 * 4096
DENSE = 3 * 4096 * 10944
SHARED = 61 * 3 * 4096 * 2 * 1408
ROUTED = 61 * 3 * 4096 * 128 * 1408
ROUTER = 61 * (128 * 4096 + 128)
VOCABULARY = 2 * 152064 * 4096
NORMS = 62 * (2 * 4096 + 2 * 128) + 4096


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    return write_checkpoint(folder, published_config(), shards=60, headers_only=True)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        # Q8_0 8.5 bits, Q6_K 6.5625, Q4_K 4.5, Q5_0 5.5; 10944 and 1408 take no blocks of 256
        (
            ["--type", "DQ4"],
            8.5 * (ATTENTION + DENSE + SHARED) + 6.5625 * VOCABULARY + ROUTED * (2 * 4.5 + 5.5) / 3,
        ),
        # padded to 1536, so that Q5_K (5.5) fits down
        (
            ["--type", "DQ4", "--pad-experts", "on"],
            8.5 * (ATTENTION + DENSE + SHARED * 1536 / 1408)
            + 6.5625 * VOCABULARY
            + ROUTED * (2 * 4.5 + 5.5) / 3 * 1536 / 1408,
        ),
        (["--type", "BF16"], 16 * (ATTENTION + DENSE + SHARED + ROUTED + VOCABULARY)),
    ],
)
def test_size(checkpoint: Path, options: list[str], bits: float) -> None:
    result = CliRunner().invoke(app, ["convert", str(checkpoint), "--dry-run", "--json", *options])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["bytes"] == (bits + 32 * (ROUTER + NORMS)) / 8
    assert found["parameters"] == sum((ATTENTION, DENSE, SHARED, ROUTED, ROUTER, VOCABULARY, NORMS))


def test_a_plan_can_be_edited_and_handed_back(checkpoint: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    arguments = ["convert", str(checkpoint), "--dry-run", "--json"]
    plan = json.loads(runner.invoke(app, arguments).stdout)
    plan["types"]["blk.7.ffn_up_exps.weight"] = "F16"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    edited = runner.invoke(app, [*arguments, "--plan", str(tmp_path / "plan.json")])
    growth = json.loads(edited.stdout)["bytes"] - plan["bytes"]
    assert growth == ROUTED / 61 / 3 * (16 - 4.5) / 8
