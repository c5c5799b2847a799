import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dots1_local.devices import child, machine
from dots1_local.devices.hardware import CPU, Device, Hardware, load_hardware
from dots1_local.devices.limits import RAM
from dots1_local.devices.machine import (
    detect,
    find_hardware,
    hardware_names,
    this_machine,
)
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.ggml import TYPES
from dots1_local.progress import Progress, silent
from tests.placement import machines
from tests.workers import free_port, local_worker

GB = 10**9
CARD = Device("CUDA0", "CUDA", "a card", 20 * GB, 24 * GB)
FOUND = Hardware("", "", "llama-cpp-python 1 (CUDA, RPC, CPU)", 1, Device(CPU, "CPU", "x", 8, 9))


class Engine:
    """Stands for the engine's process: it has devices, and counts what it measures."""

    def __init__(self) -> None:
        self.found = FOUND
        self.measured: list[str] = []

    def ask(self, request: Mapping[str, Any], progress: Progress = silent) -> Hardware:
        if (name := request.get("measure")) is None:
            return self.found
        self.measured.append(name)
        speed = machines.speed(len(self.measured), upload=1.0, upload_pageable=1.0)
        if name == CPU:
            return replace(self.found, cpu=replace(self.found.cpu, speed=speed))
        devices = (replace(each, speed=speed) for each in self.found.devices)
        return replace(self.found, devices=tuple(devices))

    def bandwidths(self, **options: Any) -> list[float | None]:
        """Of each device of this machine, the CPU first."""
        found = this_machine(**options)
        speeds = [device.speed for device in (found.cpu, *found.devices)]
        return [None if speed is None else speed.bandwidth for speed in speeds]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dots1"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine()
    monkeypatch.setattr(machine, "detect", engine.ask)
    monkeypatch.setattr(machine, "read_rate", lambda folder: 5e9)
    return engine


def test_this_machine_agrees_with_the_kernel(tmp_path: Path) -> None:
    found = this_machine(measure="cached")
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < found.cpu.free <= found.cpu.total <= 1024 * int(fields["MemTotal"].split()[0])
    assert found.cpu.speed is None
    assert found.cores >= 1
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(found.to_json()))
    assert find_hardware(str(path)) == found


def test_measures_speeds_once_and_memory_every_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.bandwidths(measure="cached") == [None]
    assert engine.bandwidths() == [1]
    monkeypatch.setattr(machine, "available_ram", lambda: RAM(3, 4))
    again = this_machine()
    assert (again.cpu.free, again.cpu.total, again.disk) == (3, 4, 5e9)
    assert engine.bandwidths(measure="cached") == engine.bandwidths() == [1]
    assert engine.bandwidths(measure=False) == [None]
    assert engine.measured == [CPU]
    assert engine.bandwidths(measure="again") == engine.bandwidths() == [2]


def test_measures_new_devices_and_remembers_others(engine: Engine) -> None:
    assert engine.bandwidths() == [1]
    engine.found = replace(FOUND, devices=(CARD,))
    assert engine.bandwidths() == [1, 2]
    engine.found = replace(FOUND, devices=(replace(CARD, free=1),))
    assert engine.bandwidths() == [1, 2]
    engine.found = FOUND
    assert engine.bandwidths(measure="again") == [3]
    engine.found = replace(FOUND, devices=(CARD,))
    assert engine.bandwidths() == [3, 2]
    engine.found = replace(FOUND, devices=(replace(CARD, total=12 * GB),))
    assert engine.bandwidths(measure="cached") == [3, None]


def test_measures_again_for_another_build_or_other_cores(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.bandwidths()
    engine.found = replace(FOUND, engine="llama-cpp-python 2 (CPU)")
    assert engine.bandwidths(measure="cached") == [None]
    engine.found = FOUND
    assert engine.bandwidths(measure="cached") == [1]
    monkeypatch.setattr(machine, "physical_cores", lambda: 99)
    assert engine.bandwidths() == [2]


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\x00", b'{"format": "dots1-hardware"}'])
def test_a_damaged_cache_is_measured_again(engine: Engine, cache: Path, damage: bytes) -> None:
    engine.bandwidths()
    (file,) = cache.iterdir()
    file.write_bytes(damage)
    assert engine.bandwidths(measure="cached") == [None]
    assert engine.bandwidths() == engine.bandwidths() == [2]
    assert list(cache.iterdir()) == [file]


def test_measures_speeds_that_cannot_be_kept(engine: Engine, cache: Path) -> None:
    cache.write_text("in the way")
    assert engine.bandwidths() == [1]


def test_names_a_worker_that_does_not_answer(engine: Engine) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    with pytest.raises(Dots1Error, match=endpoint):
        this_machine([endpoint])
    with pytest.raises(UsageError, match="HOST:PORT"):
        this_machine(["-x"])


def test_lists_a_workers_devices() -> None:
    with local_worker() as worker:
        found = this_machine([worker.endpoint], measure="cached")
    (device,) = found.devices
    assert (device.name, device.backend, device.worker) == ("RPC0", "RPC", worker.endpoint)
    assert 0 < device.free <= device.total


def test_five_descriptions_come_with_the_package() -> None:
    expected = {"24gb-64gb": 1, "24gb-128gb": 1, "2x24gb-128gb": 2, "12gb-96gb": 1, "cpu-96gb": 0}
    assert set(hardware_names()) == set(expected)
    for name, cards in expected.items():
        found = find_hardware(name)
        assert (found.name, len(found.devices)) == (name, cards)
        assert "not measurements" in found.source
        for device in (found.cpu, *found.devices):
            assert device.speed is not None
            ternary = set() if device is found.cpu else {"TQ2_0", "TQ1_0"}  # CUDA has no kernels
            assert set(device.speed.matmul) == set(TYPES) - ternary
            assert {"F16", "Q8_0"} <= set(device.speed.attention)


def test_descriptions_follow_from_specifications() -> None:
    from tools.make_machines import MACHINES

    assert [find_hardware(each.name) for each in MACHINES] == list(MACHINES)
    # By hand: 89.6 GB/s of two DDR5-5600 channels x 0.78, an RTX 3090's 936 GB/s x 0.8.
    found = find_hardware("2x24gb-128gb")
    for name, gigabytes in ((CPU, 69.9), ("CUDA1", 749)):
        speed = found.device(name).speed
        assert speed is not None
        assert speed.bandwidth == pytest.approx(gigabytes * 1e9, rel=0.001)


def test_finds_a_description_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(find_hardware("cpu-96gb").to_json()))
    assert find_hardware(str(path)) == load_hardware(path)
    with pytest.raises(UsageError, match=r"48gb .* 12gb-96gb, 24gb-128gb"):
        find_hardware("48gb")


# Whatever happens to the child is one sentence; shell scripts stand for engines in trouble.
GOOD = Hardware("m", "s", "e", 1, Device(CPU, "CPU", "a CPU", 1, 2)).to_json()


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that is run in place of Python."""
    path = tmp_path / "engine"
    path.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    return path


def says(message: object) -> str:
    return f"printf '%s\\n' 'dots1-engine {json.dumps(message)}'"


def test_the_engine_answers() -> None:
    found = detect({"workers": []})
    assert found.engine.startswith("llama-cpp-python ")
    assert "CPU" in found.engine
    assert found.cpu.speed is None


@pytest.mark.parametrize(
    ("commands", "message"),
    [
        (
            'echo "/src/ggml-cuda.cu:12: CUDA error: out of luck." >&2; kill -ABRT $$',
            r"measuring CUDA0: killed by signal 6 \(Aborted\), after it logged: "
            "CUDA error: out of luck; if a driver",
        ),
        (
            "echo 'ggml_vulkan: Found 1 Vulkan devices:' >&2; kill -SEGV $$",
            r"CUDA0: killed by signal 11 \(Segmentation fault\); if .*CUDA_VISIBLE_DEVICES=-1",
        ),
        (
            "echo '  what():  vk::Device::allocateMemory: ErrorOutOfDevice' >&2; kill -6 $$",
            r"after it logged: what\(\): vk::Device::allocateMemory: ErrorOutOfDevice; if",
        ),
        ("kill -ILL $$", "signal 4 .*compiled for another processor.* compile it again"),
        ("kill -KILL $$", "signal 9 .*more memory than is free or than a limit allows"),
        ("exit 3", "died while measuring CUDA0: exit code 3; if"),
        (r"printf 'a\033[31mb' >&2; exit 1", r"CUDA0: a \[31mb; if"),
        ("exec sleep 60", "gave up measuring CUDA0, because nothing happened for 0 seconds; if"),
        ("echo all is well; echo '{}'", "died while measuring CUDA0: exit code 0"),
        ("echo 'dots1-engine {'", "answer made no sense while measuring CUDA0"),
        ("echo 'dots1-engine 5'", "answer made no sense while measuring CUDA0"),
        (
            says({"answer": {**GOOD, "name": 3}}),
            "made no sense while measuring CUDA0: .*name: .*int",
        ),
        (says({"answer": None}), "made no sense while measuring CUDA0"),
        (says({"error": "no memory left"}), "^no memory left$"),
    ],
)
def test_an_engine_in_trouble_gives_one_sentence(
    script: Path, monkeypatch: pytest.MonkeyPatch, commands: str, message: str
) -> None:
    monkeypatch.setattr(machine, "_TIMEOUT", 0.3)
    script.write_text(f"#!/bin/sh\n{commands}\n")
    with pytest.raises(Dots1Error, match=message) as error:
        detect({"workers": [], "measure": "CUDA0", "threads": 1})
    assert "\n" not in str(error.value)


def test_ignores_what_a_driver_prints(script: Path) -> None:
    progress = says({"progress": [1, 2, "measurements", "CPU Q8_0"]})
    answer = says({"answer": GOOD})
    noise = "echo found 7 devices; printf '\\377\\376 no line end'; echo"
    script.write_text(f"#!/bin/sh\n{noise}\n{progress}\n{noise}\n{answer}\nexit 9\n")
    told: list[tuple[int, int, str, str]] = []
    found = detect({"workers": []}, lambda *step: told.append(step))
    assert found.cpu.total == 2
    assert told == [(1, 2, "measurements", "CPU Q8_0")]


def test_a_missing_worker_aborts_only_the_child() -> None:
    with pytest.raises(Dots1Error, match=r"looking for devices.*connect"):
        detect({"workers": ["127.0.0.1:1"]})


def computing(seconds: int) -> str:
    return f"for n in $(seq {10 * seconds}); do {says({'computing': 1})}; sleep 0.1; done"


def test_waits_for_a_device_while_its_driver_computes(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_TIMEOUT", 0.4)
    monkeypatch.setattr(child, "_LONG", 0.5)
    step = says({"progress": [3, 9, "measurements", "Vulkan0 Q4_K"]})
    script.write_text(f"#!/bin/sh\n{step}\n{computing(1)}\n{says({'answer': GOOD})}\n")
    told: list[tuple[int, int, str, str]] = []
    assert detect({"workers": []}, lambda *step: told.append(step)).cpu.total == 2
    assert {each[:3] for each in told} == {(3, 9, "measurements")}
    assert told[0][3] == "Vulkan0 Q4_K"
    assert told[-1][3].startswith("Vulkan0 Q4_K (for ")


def test_gives_up_a_step_that_never_ends(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_PATIENCE", 0.3)
    step = says({"progress": [3, 9, "measurements", "Vulkan0 Q4_K"]})
    script.write_text(f"#!/bin/sh\n{step}\n{computing(60)}\n")
    with pytest.raises(Dots1Error, match=r"Vulkan0, .*one step.*Vulkan0 Q4_K.*GGML_VK_VISIBLE"):
        detect({"workers": [], "measure": "Vulkan0", "threads": 1})


def test_a_child_reports_that_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real child that computes for longer than the timeout, and one that sleeps for longer."""
    (tmp_path / "busy.py").write_text(
        "import time\nfrom dots1_local.devices import child\n"
        "child._PULSE = 0.1\n"
        "def work(request):\n"
        "    end = time.monotonic() + request['computes']\n"
        "    while time.monotonic() < end:\n        pass\n"
        "    time.sleep(request['sleeps'])\n"
        "    return 7\n"
        "child.respond(work)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    assert child.ask("busy", {"computes": 3, "sleeps": 0}, "computing", timeout=2.0) == 7
    with pytest.raises(Dots1Error, match="gave up sleeping, because nothing happened for 2"):
        child.ask("busy", {"computes": 0, "sleeps": 60}, "sleeping", timeout=2.0)


def test_keeps_what_was_measured_before_a_device_failed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.found = replace(FOUND, devices=(CARD,))

    def ask(request: Mapping[str, Any], progress: Progress = silent) -> Hardware:
        if request.get("measure") == "CUDA0":
            raise Dots1Error("the driver died")
        return engine.ask(request)

    monkeypatch.setattr(machine, "detect", ask)
    with pytest.raises(Dots1Error, match="the driver died"):
        this_machine()
    monkeypatch.setattr(machine, "detect", engine.ask)
    assert engine.bandwidths() == [1, 2]
    assert engine.measured == [CPU, "CUDA0"]
