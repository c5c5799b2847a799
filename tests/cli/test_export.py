import json
import os
import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dots1_local.cli import app
from dots1_local.convert import convert_checkpoint
from tests.helpers import write_random_gguf
from tests.micro import micro_checkpoint
from tests.workers import start_dots1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("model") / "m.gguf")


def test_a_dry_run_writes_nothing_and_predicts_the_files(model: Path, tmp_path: Path) -> None:
    runner, output = CliRunner(), tmp_path / "out"
    arguments = ["export", str(model), "--shard-size", "100kB", "--json"]
    planned = runner.invoke(app, [*arguments, "--dry-run", "-o", str(output)])
    assert planned.exit_code == 0
    assert not list(tmp_path.iterdir())
    done = runner.invoke(app, [*arguments, "-o", str(output)])
    found = json.loads(done.stdout)
    assert json.loads(planned.stdout) == {k: v for k, v in found.items() if k != "files"}
    sizes = {Path(file).name: Path(file).stat().st_size for file in found["files"]}
    assert {path.name for path in output.iterdir()} == sizes.keys()
    assert sum(sizes.values()) == found["bytes"]
    assert found["shards"].items() <= sizes.items()


def test_the_table_mentions_removed_padding(tmp_path: Path) -> None:
    source = micro_checkpoint(tmp_path / "hf", hidden_size=256, moe_intermediate_size=192)
    convert_checkpoint(source, tmp_path / "m.gguf", "Q2_K", padding="on")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "m.gguf"), "--dry-run"])
    assert result.stdout.endswith(" in 1 shard, experts 192 wide, without the padding to 256\n")
    assert "router     F32" in result.stdout


@pytest.mark.parametrize("arguments", [[], ["-o", "out", "--shard-size", "many"]])
def test_usage_errors_exit_with_2(model: Path, arguments: list[str]) -> None:
    with start_dots1("export", str(model), *arguments) as process:
        process.communicate()
    assert process.returncode == 2


def test_ctrl_c_leaves_what_can_be_resumed(tmp_path: Path) -> None:
    source = micro_checkpoint(tmp_path / "hf", hidden_size=1024, vocab_size=60_000)
    convert_checkpoint(source, tmp_path / "m.gguf", "Q8_0")
    output = tmp_path / "out"
    command = ["export", str(tmp_path / "m.gguf"), "-o", str(output), "--shard-size", "1MB"]
    process = start_dots1(*command, "--threads", "1")
    partial = tmp_path / "out.partial"
    while process.poll() is None and not list(partial.glob("*.safetensors")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, complaints = process.communicate()
    assert process.returncode == 130
    assert "run the same command again" in complaints
    assert complaints.count("\n") == 1
    assert not output.exists()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert "resuming: " in result.stderr
    assert output.is_dir()
