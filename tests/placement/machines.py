"""Invented machines with round figures, for calculations by hand."""

from collections.abc import Mapping

from dots1_local.devices.hardware import CPU, Device, Hardware, Rate, Speed

__all__ = ["GB", "machine", "speed"]

GB = 10**9
NO_LIMIT = Rate(1e18, 1e18)


def speed(
    bandwidth: float,
    *,
    matmul: Mapping[str, Rate] | None = None,
    attention: Mapping[str, Rate] | None = None,
    node: float = 0,
    split: float = 0,
    upload: float = 0,
    upload_pageable: float = 0,
    repacked: Mapping[str, Rate] | None = None,
) -> Speed:
    """A device whose bandwidth is its only limit unless other limits are given."""
    return Speed(
        bandwidth,
        matmul or {"F32": NO_LIMIT},
        attention or {"F16": NO_LIMIT, "Q8_0": NO_LIMIT},
        node,
        split,
        upload,
        upload_pageable,
        repacked or {},
    )


def machine(
    ram: int = 100 * GB,
    gpus: tuple[int, ...] = (),
    workers: tuple[int, ...] = (),
    *,
    cpu: Speed | None = None,
    gpu: Speed | None = None,
    worker: Speed | None = None,
    disk: float | None = None,
) -> Hardware:
    """A machine with `ram` bytes, and a device for each size in `gpus` and in `workers`."""
    devices = [
        Device(f"CUDA{n}", "CUDA", "a GPU", nbytes, nbytes, gpu) for n, nbytes in enumerate(gpus)
    ]
    devices += [
        Device(f"RPC{n}", "RPC", "a worker", nbytes, nbytes, worker, f"10.0.0.{n + 1}:50052")
        for n, nbytes in enumerate(workers)
    ]
    processor = Device(CPU, "CPU", "a CPU", ram, ram, cpu)
    return Hardware("a test's machine", "made up", "none", 8, processor, tuple(devices), disk)
