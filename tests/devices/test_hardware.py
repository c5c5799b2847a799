import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dots1_local.devices import hardware as module
from dots1_local.devices.hardware import Device, Hardware, Rate, Speed, load_hardware
from dots1_local.devices.hardware import physical_cores as cores
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


def test_a_description_says_all_there_is_to_say(tmp_path: Path) -> None:
    assert load_hardware(written(tmp_path, MACHINE.to_json())) == MACHINE
    bare = replace(MACHINE, devices=(), disk=None, cpu=replace(MACHINE.cpu, speed=None))
    assert load_hardware(written(tmp_path, bare.to_json())) == bare


def test_a_rate_of_plain_matrices_may_be_left_out(tmp_path: Path) -> None:
    content = MACHINE.to_json()
    del content["cpu"]["speed"]["matmul"]["Q8_0"]["dense"]
    del content["cpu"]["speed"]["repacked"]
    speed = load_hardware(written(tmp_path, content)).cpu.speed
    assert speed is not None
    assert speed.matmul["Q8_0"] == Rate(1e9, 2e9, None)
    assert speed.repacked == {}


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (("cpu", "speed", "bandwidth"), 0, "as 'bandwidth', not a positive number"),
        (("cpu", "speed", "node"), -1, "as 'node', not a positive number"),
        (("cpu", "speed", "matmul", "Q8_0", "dense"), "fast", "as 'dense'"),
        (("cpu", "speed", "split"), 10**400, "as 'split', not a positive number"),
        (("devices", 0, "speed", "upload"), 0, "as 'upload', not a positive number"),
        (("cpu", "free"), 1.5, "as 'free', not an integer"),
        (("cpu", "name"), "GPU", "must call the CPU 'CPU'"),
        (("cores",), 0, "as 'cores'"),
        (("devices",), {}, "as 'devices', not a list"),
        (("speeed",), 1, "unknown key 'speeed'"),
    ],
)
def test_a_figure_that_makes_no_sense_is_named(
    tmp_path: Path, place: tuple[Any, ...], value: Any, sentence: str
) -> None:
    worker = replace(MACHINE.devices[0], speed=SPEED)
    target = content = replace(MACHINE, devices=(worker,)).to_json()
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    with pytest.raises(UsageError, match=sentence):
        load_hardware(written(tmp_path, content))


def test_a_device_is_found_by_name() -> None:
    assert MACHINE.device("RPC0").free == 5
    with pytest.raises(UsageError, match="desk has no device CUDA0; it has RPC0, CPU"):
        MACHINE.device("CUDA0")


def test_hyper_threads_and_quotas_are_no_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cpu in range(8):  # 4 cores of two threads, as the kernel numbers them
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(module, "_CPUS", tmp_path)
    monkeypatch.setattr(module, "allowed_cpus", lambda: set(range(8)))
    found = []
    for quota in (None, 64.0, 2.5, 0.5):
        monkeypatch.setattr(module, "cpu_quota", lambda quota=quota: quota)
        found.append(cores())
    assert found == [4, 4, 2, 1]
