import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dots1_local.devices.hardware import Device, Hardware, Rate, Speed, load_hardware
from dots1_local.errors import UsageError

SPEED = Speed(
    50e9, {"Q8_0": Rate(1e9, 2e9, 3e9)}, {"F16": Rate(1e9, 2e9)}, 1e-6, 1e-5, 2e10, 1e10,
    {"Q4_K": Rate(4e9, 5e9)},
)  # fmt: skip
MACHINE = Hardware(
    "desk", "made up", "an engine", 8,
    Device("CPU", "CPU", "a CPU", 10, 20, SPEED),
    (Device("RPC0", "RPC", "10.0.0.2:50052", 5, 6, None, "10.0.0.2:50052"),),
    1e9,
)  # fmt: skip


def written(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "machine.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_a_description_round_trips(tmp_path: Path) -> None:
    assert load_hardware(written(tmp_path, MACHINE.to_json())) == MACHINE
    bare = replace(MACHINE, devices=(), disk=None, cpu=replace(MACHINE.cpu, speed=None))
    assert load_hardware(written(tmp_path, bare.to_json())) == bare


def test_fields_with_defaults_may_be_left_out(tmp_path: Path) -> None:
    content = MACHINE.to_json()
    del content["cpu"]["speed"]["matmul"]["Q8_0"]["dense"]
    del content["cpu"]["speed"]["repacked"]
    speed = load_hardware(written(tmp_path, content)).cpu.speed
    assert speed is not None
    assert speed.matmul["Q8_0"] == Rate(1e9, 2e9, None)
    assert speed.repacked == {}


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("cpu", "speed", "bandwidth"), 0, "cpu.speed.bandwidth: .*float > 0"),
        (("cpu", "speed", "node"), -1, "cpu.speed.node: .*float >= 0"),
        (("cpu", "speed", "matmul", "Q8_0", "dense"), "fast", "cpu.speed.matmul.*dense: .*str"),
        (("cpu", "speed", "split"), 10**400, "cpu.speed.split"),
        (("devices", 0, "speed", "upload"), 0, r"devices\[0\].speed.upload: .*float > 0"),
        (("cpu", "free"), 1.5, "cpu.free: .*int, got float"),
        (("cpu", "free"), 10**12, "cpu.free: 1000000000000 of .* bytes cannot be free"),
        (("devices", 0, "total"), 4, r"devices\[0\].free: 5 of 4 bytes cannot be free"),
        (("cpu", "name"), "GPU", "cpu.name: .*'CPU'"),
        (("cpu", "description"), "\x1b[2J", "cpu.description"),
        (("devices", 0, "name"), "CPU", "devices: .*CPU, CPU"),
        (("cores",), 0, "cores: .*int >= 1"),
        (("devices",), {}, "devices: .*object"),
        (("speeed",), 1, "speeed"),
        (("devices", 0, "speed", "nodes"), 1, r"devices\[0\].speed.nodes"),
        (("version",), 2, "another version"),
        (("format",), "dots1-placement", "not a description of a machine"),
    ],
)
def test_names_the_field_of_a_figure_that_makes_no_sense(
    tmp_path: Path, place: tuple[Any, ...], value: Any, named: str
) -> None:
    worker = replace(MACHINE.devices[0], speed=SPEED)
    target = content = replace(MACHINE, devices=(worker,)).to_json()
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    path = written(tmp_path, content)
    with pytest.raises(UsageError, match=named) as error:
        load_hardware(path)
    assert str(path) in str(error.value)


def test_finds_a_device_by_name() -> None:
    assert MACHINE.device("RPC0").free == 5
    with pytest.raises(UsageError, match="desk has no device CUDA0; it has RPC0, CPU"):
        MACHINE.device("CUDA0")


def test_short_rows_slow_decoding() -> None:
    """A row takes 2 s besides 1 ms a weight: 6.096 s with 4,096 weights, 3.408 s with 1,408."""
    rate = Rate(4096 / 6.096, 1e4, short=1408 / 3.408)
    for columns in (1408, 1536, 2816, 4096):
        assert rate.decode_of(columns) == pytest.approx(columns / (2 + columns / 1e3))
    assert rate.decode_of(192) == rate.short  # nothing shorter is known
    assert Rate(5.0, 6.0).decode_of(1408) == 5.0
