import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dots1_local.cli import app
from dots1_local.devices import machine
from dots1_local.devices.machine import find_hardware
from dots1_local.ggml import TYPES


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["hardware", *arguments])


def test_shows_what_a_description_says() -> None:
    output = run("--hardware", "24gb-64gb").stdout
    lines = output.splitlines()
    assert lines[0].startswith("24gb-64gb: 8 cores")
    (card,) = (line for line in lines if line.startswith("CUDA0") and "RTX 4090" in line)
    assert card.split()[-6:] == ["806.0", "GB/s", "2.5", "µs", "30", "µs"]
    assert "CUDA0 takes 25.0 GB/s from pinned RAM, 12.5 GB/s from any other" in output
    for name in TYPES:
        on_gpu = not name.startswith("TQ")  # CUDA has no kernels for ternary types
        assert sum(line.startswith(f"{name} ") for line in lines) >= 1 + on_gpu
    assert "\x1b" not in output


def test_what_json_prints_can_be_read_again(tmp_path: Path) -> None:
    result = run("--hardware", "2x24gb-128gb", "--json")
    path = tmp_path / "machine.json"
    path.write_text(result.stdout, encoding="utf-8")
    assert find_hardware(str(path)) == find_hardware("2x24gb-128gb")
    assert run("--hardware", str(path)).stdout == run("--hardware", "2x24gb-128gb").stdout


def test_this_machine_is_measured_when_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def this_machine(workers: list[str], *, measure: Any, progress: Any) -> Any:
        asked.append((workers, measure))
        bare = find_hardware("24gb-64gb")
        devices = tuple(replace(device, speed=None) for device in bare.devices)
        return replace(bare, engine="llama-cpp-python 1 (CUDA, CPU)", devices=devices, disk=None)

    monkeypatch.setattr(machine, "this_machine", this_machine)
    result = run("--worker", "a:1", "--worker", "b:2")
    assert "disk: not measured" in result.stdout
    assert "without RPC" in result.stderr
    assert 'CMAKE_ARGS="-DGGML_RPC=on"' in result.stderr
    assert json.loads(run("--refresh", "--json").stdout)["devices"][0]["speed"] is None
    assert asked == [(["a:1", "b:2"], True), ([], "again")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--hardware", "48gb"], "48gb"),
        (["--hardware", "24gb-64gb", "--refresh"], "--worker and --refresh"),
        (["--hardware", "24gb-64gb", "--worker", "a:1"], "--worker and --refresh"),
        (["--worker", "http://x:1"], "http://x:1"),
    ],
)
def test_contradictions_are_refused(arguments: list[str], sentence: str) -> None:
    result = run(*arguments)
    assert result.exit_code != 0
    assert sentence in str(result.exception)
