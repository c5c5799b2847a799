import json
import subprocess
import sys

import pytest

from dots1_local.devices import backends
from dots1_local.devices.drivers import build_with
from dots1_local.errors import UsageError
from tests.workers import local_worker

# In a process of its own: a worker that is gone would abort this one.
WITH_WORKER = """
import json, sys
from dots1_local.devices import backends
added = backends.add_worker(sys.argv[1])
assert backends.add_worker(sys.argv[1]) == added
assert backends.device("RPC0") == added[0]
assert backends.device("RPC0").buffer_type != backends.device("CPU").buffer_type
assert backends.device("RPC0").host_buffer_type is None
print(json.dumps([[d.name, d.backend, d.kind, d.description, d.total] for d in backends.devices()]))
"""


def test_lists_the_cpu_with_its_memory() -> None:
    (cpu,) = (device for device in backends.devices() if device.kind == "cpu")
    assert (cpu.name, cpu.backend) == ("CPU", "CPU")
    with open("/proc/meminfo", encoding="utf-8") as file:
        total = 1024 * int(file.readline().split()[1])
    assert cpu.total == pytest.approx(total, rel=0.01)
    assert backends.device("CPU").handle == cpu.handle
    assert "CPU" in backends.backend_names()


def test_names_an_unknown_device_and_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"CUDA7; it has .*CPU"):
        backends.device("CUDA7")


def test_adds_a_workers_devices() -> None:
    with local_worker() as worker:
        result = subprocess.run(
            [sys.executable, "-c", WITH_WORKER, worker.endpoint],
            capture_output=True,
            text=True,
            check=True,
        )
    (remote,) = (row for row in json.loads(result.stdout) if row[0] == "RPC0")
    assert remote[1:4] == ["RPC", "gpu", worker.endpoint]
    assert remote[4] > 1 << 28


def test_gives_the_command_that_builds_a_backend() -> None:
    command = build_with("GGML_CUDA", "GGML_RPC")
    assert command.startswith('CMAKE_ARGS="-DGGML_CUDA=on -DGGML_RPC=on" pip install ')
    assert "--no-cache-dir" in command  # pip would hand back the wheel it built before
