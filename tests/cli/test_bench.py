import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dots1_local.cli import app
from dots1_local.devices import machine
from dots1_local.devices.machine import find_hardware
from dots1_local.errors import UsageError
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.planner import place
from tests.helpers import write_random_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("bench") / "model.gguf")


@pytest.fixture(autouse=True)
def _a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def this_machine(workers: Any, *, progress: Any) -> Any:
        return find_hardware("cpu-96gb")

    monkeypatch.setattr(machine, "this_machine", this_machine)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments), "-t", "1"])


def test_shows_ours_beside_llama_cpp_by_itself(model: Path) -> None:
    result = run(model, "--context", "32,64")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["placement", "context", "prefill"]
    assert lines[1].startswith("ours ")
    assert "%)" in lines[1]
    assert lines[2].split()[0] == "64"
    assert any(line.startswith("llama.cpp by itself ") for line in lines)


def test_tries_a_plan_and_other_ubatches(model: Path, tmp_path: Path) -> None:
    placement = place(GGUFFile.open(model), find_hardware("cpu-96gb"), context=256, threads=1)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(placement.to_json()))
    result = run(model, "--context", "32", "--plan", plan, "--ubatch", "16,64", "--json")
    assert result.exit_code == 0, result.stderr
    outcomes = json.loads(result.stdout)["outcomes"]
    assert [(each["name"], each["placement"]["ubatch"]) for each in outcomes] == [
        ("plan.json", placement.ubatch),
        ("plan.json, ubatch 16", 16),
        ("plan.json, ubatch 64", 64),
    ]
    assert all(each["measured"][0]["decode"] > 0 for each in outcomes)


def test_a_plan_that_cannot_be_loaded_exits_with_1(model: Path, tmp_path: Path) -> None:
    placement = place(GGUFFile.open(model), find_hardware("24gb-64gb"), context=256)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(placement.to_json()))
    result = run(model, "--context", "32", "--plan", plan)
    assert result.exit_code == 1
    assert "plan.json: cpu-96gb has no device CUDA0" in result.stderr.replace("\n", " ")
    assert "failed" in result.stdout


@pytest.mark.parametrize("context", ["0", "64,32", "32,,x", "32,32", "", ","])
def test_refuses_contexts_that_are_not_an_ascending_list(model: Path, context: str) -> None:
    result = run(model, "--context", context)
    assert isinstance(result.exception, (UsageError, SystemExit))


def test_a_plan_brings_its_workers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement = place(GGUFFile.open(model), find_hardware("cpu-96gb"), context=256, threads=1)
    asked = []

    def this_machine(workers: Any, *, progress: Any) -> Any:
        asked.append(workers)
        return find_hardware("cpu-96gb")

    monkeypatch.setattr(machine, "this_machine", this_machine)
    plans = [tmp_path / name for name in "abc"]
    for plan, workers in zip(plans, [(), ("box:1",), ("box:2",)], strict=True):
        plan.write_text(json.dumps(replace(placement, workers=workers).to_json()))
    options = ("--context", "32", "--no-alternatives")
    run(model, *options, "--plan", plans[0])
    run(model, *options, "--plan", plans[0], "--plan", plans[1])
    assert asked == [[], ["box:1"]]
    for more in (("--worker", "box:1"), ("--plan", plans[2])):
        assert isinstance(run(model, "--plan", plans[1], *more).exception, UsageError)
