from typing import Any

from benchmarks.gpu_table import markdown
from dots1_local.devices.hardware import CPU, Device, Hardware

GB = 10**9


def test_an_outcome_is_a_row_of_the_table() -> None:
    device = Device("CUDA0", "CUDA", "a GPU", 24 * GB, 80 * GB)
    cpu = Device(CPU, "CPU", "a processor", 64 * GB, 64 * GB)
    depth = {"tokens": 512, "prefill": 1234.5, "decode": 20.25}
    sizes = [("CUDA0", 19), ("CUDA0", 2), (CPU, 1)]
    ours = {
        "name": "ours",
        "planned_bytes": {"CUDA0": 20 * GB, CPU: GB},
        "bytes": [{"device": name, "real": size * GB} for name, size in sizes],
        "driver_bytes": {"CUDA0": 22 * GB},
        "measured": [depth],
        "predicted": [depth | {"decode": 22.0}],
        "error": None,
    }
    nothing: dict[str, Any] = {"planned_bytes": {}, "bytes": [], "driver_bytes": {}, "measured": []}
    failed = nothing | {"name": "llama.cpp by itself", "error": "no memory", "predicted": []}
    text = markdown(
        {
            "machine": Hardware("here", "by hand", "any", 1, cpu, (device,)).to_json(),
            "device": "gpu",
            "device_free": 80 * GB,
            "limit": 8 * GB,
            "vram": 24 * GB,
            "model": {"recipe": "DQ4", "bytes": 30 * GB, "num_hidden_layers": 22},
            "context": 8192,
            "outcomes": [ours, failed],
        }
    )
    assert "held to 8.00 GB of 80.00 GB free (these layers' share of 24.00 GB for 62)" in text
    assert text.splitlines()[-2:] == [
        "| ours | 20.00 → 21.00 | 22.00 | 1.00 → 1.00 | 1234 → 1234 (512) | 22 → 20.2 (512) |",
        "| llama.cpp by itself | - → - | - | - → - | no memory |  |",
    ]
