import json
import subprocess
import sys

import pytest

from dots1_local.devices import speed as module
from dots1_local.devices.backends import device, devices
from dots1_local.devices.hardware import Speed
from dots1_local.devices.speed import measure_speed
from dots1_local.ggml import KV_TYPES, TYPES
from tests.workers import local_worker

SMALL = {
    "_HIDDEN": 512, "_WIDTH": 32, "_EXPERTS": 12, "_BYTES": 1 << 20, "_MIN_SECONDS": 0.0,
    "_HEADS": 4, "_LONG_CACHE": 512, "_SHORT_CACHE": 64, "_UPLOADS": (1 << 12, 1 << 14),
}  # fmt: skip

# In a process of its own: a worker that is gone would abort this one.
OF_WORKER = """
import json, sys
from dots1_local.devices import speed
from dots1_local.devices.backends import add_worker
for name, value in json.loads(sys.argv[2]).items():
    setattr(speed, name, value)
(device,) = add_worker(sys.argv[1])
found = speed.measure_speed(device, 1)
print(json.dumps([[*found.matmul], [*found.attention], [*found.repacked], found.upload,
    found.upload_pageable, found.split, found.bandwidth]))
"""


@pytest.fixture
def told() -> list[tuple[int, int]]:
    return []


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch, told: list[tuple[int, int]]) -> Speed:
    for name, value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    (device,) = (each for each in devices() if each.kind == "cpu")
    return measure_speed(device, 1, lambda done, total, unit, what: told.append((done, total)))


def test_measures_every_type(cpu: Speed, told: list[tuple[int, int]]) -> None:
    assert list(cpu.matmul) == list(TYPES)
    assert list(cpu.attention) == list(KV_TYPES)
    for rate in (*cpu.matmul.values(), *cpu.repacked.values()):
        assert rate.decode > 0
        assert rate.prefill > 0
        assert rate.dense is not None
        assert rate.short is not None
    assert set(cpu.repacked) <= set(TYPES)
    assert bool(cpu.repacked) == bool(device("CPU").extra_buffer_types)
    assert [done for done, _ in told] == list(range(1, told[0][1] + 1))


def test_no_type_reads_faster_than_the_memory(cpu: Speed) -> None:
    read = [rate.decode * TYPES[name].bpw / 8 for name, rate in cpu.matmul.items()]
    assert max(read) == pytest.approx(cpu.bandwidth)


def test_the_cpu_needs_no_uploads(cpu: Speed) -> None:
    assert (cpu.upload, cpu.upload_pageable) == (0, 0)
    assert 0 < cpu.split < 1
    assert 0 <= cpu.node < cpu.split


def test_asks_a_workers_device_only_for_common_kv_types() -> None:
    with local_worker() as worker:
        result = subprocess.run(
            [sys.executable, "-c", OF_WORKER, worker.endpoint, json.dumps(SMALL)],
            capture_output=True,
            text=True,
            check=True,
        )
    matmul, attention, repacked, *figures = json.loads(result.stdout)
    assert matmul == list(TYPES)
    assert attention == ["F32", "F16", "Q8_0", "Q4_0"]
    assert repacked == []
    assert min(figures) > 0
