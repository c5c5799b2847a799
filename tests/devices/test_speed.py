import json
import subprocess
import sys
from math import prod

import pytest

from dots1_local.devices import speed as module
from dots1_local.devices.backends import device, devices
from dots1_local.devices.bench_graph import BenchDevice, BenchGraph
from dots1_local.devices.hardware import Speed
from dots1_local.devices.speed import measure_speed
from dots1_local.errors import Dots1Error
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
    assert [done for done, _ in told] == list(range(told[0][1]))


def test_measures_a_device_that_takes_small_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 5 * 4 * 512 * 32  # bytes of 5 experts in F32, fewer than a token is routed to

    class Limited(BenchGraph):
        """Refuses larger matrices, as Vulkan does by its maxStorageBufferRange."""

        refuses = False

        def weights(self, kind: int, *shape: int) -> int:
            (stored,) = (each for each in TYPES.values() if each.ggml == kind)
            is_matrix = shape[0] == SMALL["_HIDDEN"]
            self.refuses |= is_matrix and stored.row_bytes(shape[0]) * prod(shape[1:]) > limit
            return super().weights(kind, *shape)

        def place(self) -> bool:
            return not self.refuses and super().place()

    for name, value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "BenchGraph", Limited)
    monkeypatch.setattr(BenchDevice, "largest_tensor", limit)
    found = measure_speed(device("CPU"), 1)
    assert list(found.matmul) == list(TYPES)


def test_a_device_that_multiplies_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    with pytest.raises(Dots1Error, match="CPU cannot multiply"):
        measure_speed(device("CPU"), 1, types=())


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
