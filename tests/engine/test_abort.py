"""What happens when llama.cpp aborts, in real processes: message, handlers, exit code."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dots1_local.engine.abort import explain
from tests.helpers import write_random_gguf
from tests.workers import local_worker

SETUP = """
import sys
from pathlib import Path
from dots1_local.ggml import library
from dots1_local.engine.abort import on_abort

def save(sentence):
    Path(sys.argv[1]).write_text("the conversation")

def show(sentence):
    print(f"dots1: {sentence}", file=sys.stderr)
"""
LOST = "the connection to a worker was lost: look there why it ended, and start it again"


def run(tmp_path: Path, script: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script that can save into the file `saved`."""
    command = [sys.executable, "-c", SETUP + script, str(tmp_path / "saved"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("message", "log", "sentence"),
    [
        ("Remote RPC server crashed or returned malformed response", [], LOST),
        ("Failed to connect to 10.0.0.2:50052\n", [], "worker at 10.0.0.2:50052 does not answer"),
        ("RPC handshake failed for 10.0.0.2:1", [], "worker at 10.0.0.2:1 does not answer"),
        (
            "CUDA error",
            ["CUDA error: out of memory", "  current device: 0, in function alloc", "  cudaMalloc"],
            "the GPU ran out of memory while it computed",
        ),
        (
            "CUDA error",
            ["an earlier complaint", "CUDA error: an illegal memory access was encountered"],
            "the GPU failed (an illegal memory access was encountered)",
        ),
        (
            "vk::DeviceLostError",
            ["ggml_vulkan: device lost on NVIDIA RTX 3090"],
            "the GPU failed (device lost on NVIDIA RTX 3090)",
        ),
        ("vk::OutOfDeviceMemoryError", [], "the GPU ran out of memory while it computed"),
        ("GGML_ASSERT(n > 0) failed", [], "cannot continue: GGML_ASSERT(n > 0) failed"),
        ("", ["vk::DeviceLostError"], "cannot continue: vk::DeviceLostError"),
    ],
)
def test_explains_what_happened(message: str, log: list[str], sentence: str) -> None:
    for place in ("/build/ggml-rpc.cpp:354: ", "C:\\ggml\\ggml.c:7: "):
        said = explain(place + message, log)
        assert sentence in said
        assert "ggml-rpc.cpp" not in said
        assert "\n" not in said


def test_a_killed_worker_ends_the_process_with_a_sentence(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "model.gguf")
    script = """
import os
from dots1_local.engine.engine import Engine
from dots1_local.placement.placement import Placement

path, worker, pid = sys.argv[2:]
placement = Placement(
    path, os.path.getsize(path), 3, 256, "F16", True, 64, 1, "plain",
    layers={"RPC0": 2}, workers=(worker,),
)
with on_abort(show), on_abort(save), Engine.open(path, placement=placement) as engine:
    engine.decode([1, 2, 3], 0)
    print("an answer that", end=" ")
    os.kill(int(pid), 9)
    for position in range(3, 250):
        engine.decode([4], position)
"""
    with local_worker() as worker:
        pid = str(worker.process.pid)
        code, out, err = run(tmp_path, script, str(path), worker.endpoint, pid)
    assert (code, out, err) == (1, "an answer that ", f"dots1: {LOST}\n")
    assert (tmp_path / "saved").read_text() == "the conversation"


def test_a_handler_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    script = """
with on_abort(show), on_abort(save), on_abort(lambda sentence: 1 / 0):
    library().ggml_abort(b"ggml.c", 7, b"out of luck")
"""
    code, out, err = run(tmp_path, script)
    assert (code, out) == (1, "")
    assert err == "dots1: llama.cpp failed and cannot continue: out of luck\n"
    assert (tmp_path / "saved").exists()


def test_a_cpp_exception_ends_the_process_with_a_sentence(tmp_path: Path) -> None:
    script = """
terminate = getattr(library(), "_ZSt9terminatev", None)
with on_abort(show):
    terminate() if terminate else library().ggml_abort(b"ggml.c", 7, b"")
"""
    code, _, err = run(tmp_path, script)
    assert code == 1
    assert err == "dots1: llama.cpp failed and cannot continue\n"


def test_an_uncaught_cpp_exception_is_named(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    source, built = tmp_path / "fails.cpp", tmp_path / "fails.so"
    source.write_text(
        "#include <stdexcept>\n"
        "namespace vk { struct OutOfDeviceMemoryError : std::runtime_error {"
        ' OutOfDeviceMemoryError() : std::runtime_error("x") {} }; }\n'
        'extern "C" void fail() noexcept { throw vk::OutOfDeviceMemoryError(); }\n'
        'extern "C" void fail_plainly() noexcept { throw std::runtime_error("x"); }\n'
    )
    subprocess.run([compiler, "-w", "-shared", "-fPIC", source, "-o", built], check=True)
    script = """
import ctypes
with on_abort(show):
    getattr(ctypes.CDLL(sys.argv[2]), sys.argv[3])()
"""
    code, _, err = run(tmp_path, script, str(built), "fail")
    assert (code, err.startswith("dots1: the GPU ran out of memory")) == (1, True)
    code, _, err = run(tmp_path, script, str(built), "fail_plainly")
    assert (code, "runtime_error" in err) == (1, True)


def test_after_the_block_llama_cpp_aborts_as_usual(tmp_path: Path) -> None:
    script = """
import os
os.environ["GGML_NO_BACKTRACE"] = "1"
with on_abort(show):
    pass
library().ggml_abort(b"ggml.c", 7, b"out of luck")
"""
    code, _, err = run(tmp_path, script)
    assert code == -6
    assert err.startswith("ggml.c:7: out of luck")


def test_handlers_run_once_if_several_threads_abort(tmp_path: Path) -> None:
    script = """
from threading import Barrier, Thread

barrier = Barrier(5)

def fail():
    barrier.wait()
    library().ggml_abort(b"ggml.c", 7, b"out of luck")

with on_abort(show), on_abort(save):
    for _ in range(4):
        Thread(target=fail, daemon=True).start()
    if len(sys.argv) > 2:
        def start(self):
            raise RuntimeError("can't start new thread")
        Thread.start = start
    barrier.wait()
    while True:
        sum(range(1000))
"""
    code, out, err = run(tmp_path, script)
    assert (code, out) == (1, "")
    assert err == "dots1: llama.cpp failed and cannot continue: out of luck\n"
    assert (tmp_path / "saved").exists()
    assert run(tmp_path, script, "without")[0] == 1
