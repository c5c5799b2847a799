import subprocess
import sys

from dots1_local.engine.log import Allocated, Difference, compare, memory_warnings, read_report
from dots1_local.placement.footprint import Usage

MIB = 1 << 20
# As llama.cpp logs it, less the names of its functions.
LOG = [
    "CPU_Mapped model buffer size =  1000.00 MiB",
    "CPU_REPACK model buffer size =   300.00 MiB",
    "CUDA_Host model buffer size =    50.50 MiB",
    "CUDA1 model buffer size =   100.00 MiB",
    "CUDA10 model buffer size =    10.00 MiB",
    "RPC0[127.0.0.1:50052] model buffer size =   200.00 MiB",
    "RPC0[10.0.0.2:50052] model buffer size =   300.00 MiB",
    "CPU  output buffer size =     0.50 MiB",
    "CUDA1 KV buffer size =    16.00 MiB",
    "CPU KV buffer size =     8.00 MiB",
    "RPC0[127.0.0.1:50052] compute buffer size =     4.00 MiB",
    "CUDA_Host compute buffer size =     2.00 MiB",
]
# The engine numbers workers' devices on, a worker its own from 0.
DEVICES = {
    "CUDA1": "CUDA1",
    "CUDA10": "CUDA10",
    "RPC0[127.0.0.1:50052]": "RPC0",
    "RPC0[10.0.0.2:50052]": "RPC1",
}


def test_adds_up_buffers_by_device() -> None:
    report = read_report(LOG, DEVICES, weights=1 << 40)
    assert report == {
        "CPU": Allocated(round(1350.5 * MIB), 8 * MIB, round(2.5 * MIB)),
        "CUDA1": Allocated(100 * MIB, 16 * MIB, 0),
        "CUDA10": Allocated(10 * MIB, 0, 0),
        "RPC0": Allocated(200 * MIB, 0, 4 * MIB),
        "RPC1": Allocated(300 * MIB, 0, 0),
    }
    assert report["CUDA1"].total == 116 * MIB


def test_counts_only_the_part_of_a_mapping_that_is_not_elsewhere() -> None:
    elsewhere = (350.5 + 610) * MIB
    report = read_report(LOG, DEVICES, weights=round(elsewhere) + 7)
    assert report["CPU"].weights == round(350.5 * MIB) + 7


def test_compares_with_a_prediction() -> None:
    report = read_report(LOG[3:4] + LOG[8:9], {"CUDA1": "CUDA1"}, weights=0)
    predicted = {"CUDA1": Usage(attention=40 * MIB, routed=59 * MIB, kv=16 * MIB, compute=3)}
    assert compare(report, predicted) == (
        Difference("CUDA1", "weights", 99 * MIB, 100 * MIB),
        Difference("CUDA1", "kv", 16 * MIB, 16 * MIB),
        Difference("CUDA1", "compute", 3, 0),
    )


def test_warns_from_2_percent_or_300_mib_on() -> None:
    gib = 1 << 10
    taken = {"CPU": Allocated(100 * gib * MIB), "CUDA0": Allocated(gib * MIB, 0, gib * MIB)}
    fine = {
        "CPU": Usage(routed=102 * gib * MIB, scratch=50 * gib * MIB),
        "CUDA0": Usage(routed=(2 * gib - 300) * MIB),
    }
    assert memory_warnings(taken, fine) == []
    wrong = {"CPU": Usage(routed=103 * gib * MIB), "CUDA0": Usage(routed=(2 * gib - 301) * MIB)}
    cpu, gpu = memory_warnings(taken, wrong)
    assert all(part in cpu for part in ("CPU", "107.4 GB", "110.6 GB"))
    assert all(part in gpu for part in ("CUDA0", "2.1 GB", "1.8 GB"))


LOADS = """
import logging, sys
{before}
import dots1_local.engine.log
from dots1_local.ggml import library
ggml = library("ggml")
ggml.ggml_backend_load.argtypes = [__import__("ctypes").c_char_p]
ggml.ggml_backend_load(b"/there/is/no/such/library.so")  # logs an error
"""


def logged(before: str = "") -> tuple[str, str]:
    command = [sys.executable, "-c", LOADS.format(before=before)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_what_the_engine_logs_stays_off_the_terminal() -> None:
    assert logged() == ("", "")


def test_a_programs_logging_gets_what_the_engine_logs() -> None:
    out, err = logged("logging.basicConfig(level=logging.DEBUG, format='%(name)s %(levelname)s')")
    assert out == ""
    assert "dots1_local.engine ERROR" in err.splitlines()
