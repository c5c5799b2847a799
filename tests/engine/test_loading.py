"""Placements that the engine carries out, with a worker as a second device.

Whatever connects to a worker runs in a child process: the engine keeps its devices for good.
"""

import re
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from numpy.typing import NDArray

from dots1_local.devices import backends
from dots1_local.devices.limits import RAM
from dots1_local.engine.engine import Engine
from dots1_local.engine.loading import OutOfMemory
from dots1_local.engine.log import Report
from dots1_local.errors import Dots1Error, GGUFError, UsageError
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.footprint import Usage
from dots1_local.placement.placement import HostMemory, Placement
from tests.conftest import Converted
from tests.engine import engine_memory
from tests.helpers import all_logits, write_random_gguf
from tests.workers import Worker, local_worker

TEXT = list(b"the quick brown fox jumps over the lazy dog")
EXPERTS = r"ffn_(gate|up|down)_exps"
ROUNDING = 50_000  # the engine's log is exact to 5 kB a buffer
# A layer's weights in VRAM whose KV cache stays in RAM, where attn_output keeps its attention.
LENT = r"blk\.1\.(attn_[qkv]|ffn_(gate|up|down)_shexp)\.weight"

Run = Callable[..., Any]
Decisions = dict[str, Any]  # fields of a placement, which cannot be sent to a child itself
Logits = NDArray[np.float32]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("loading") / "model.gguf")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with local_worker() as worker:
        yield worker


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Call a function of this module in the one child process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda function, *values, **options: pool.submit(
            function, *values, **options
        ).result()


def placement_for(path: Path, **decisions: Any) -> Placement:
    """A placement with everything in RAM, unless `decisions` say otherwise."""
    small = {"context": 256, "kv_type": "F32", "flash_attention": False, "ubatch": 64}
    return engine_memory.placement_for(path, {**small, **decisions})


def logits_and_report(
    path: Path, decisions: Decisions | None, **options: Any
) -> tuple[Logits, Report]:
    placement = None if decisions is None else placement_for(path, **decisions)
    with Engine.open(path, placement=placement, all_logits=True, threads=1, **options) as engine:
        return all_logits(engine, TEXT), dict(engine.report)


def all_in_ram(path: Path, host_memory: HostMemory = "plain") -> Logits:
    return logits_and_report(path, {"host_memory": host_memory})[0]


def test_experts_of_some_layers_go_to_a_worker(model: Path, worker: Worker, run: Run) -> None:
    decisions = {
        "layers": {"RPC0": 0},
        "overrides": ((r"blk\.1\." + EXPERTS, "RPC0"), (r"blk\.2\.ffn_down_exps", "RPC0")),
        "workers": (worker.endpoint,),
    }
    logits, report = run(logits_and_report, model, decisions)
    one = 8 * 32 * 64 * 4  # experts x width x hidden size, F32
    assert report["RPC0"].weights == pytest.approx(4 * one, abs=ROUNDING)
    assert report["RPC0"].kv == 0
    assert report["CPU"].kv == pytest.approx(3 * 256 * 2 * 64 * 4, abs=ROUNDING)
    np.testing.assert_allclose(logits, all_in_ram(model), atol=1e-3)


def test_layers_go_to_a_worker_and_their_experts_stay(
    model: Path, worker: Worker, run: Run
) -> None:
    decisions = {
        "layers": {"RPC0": 3},
        "overrides": ((EXPERTS, "CPU"),),
        "workers": (worker.endpoint,),
    }
    logits, report = run(logits_and_report, model, decisions)
    layer = 256 * 2 * 64 * 4
    assert report["RPC0"].kv == pytest.approx(2 * layer, abs=ROUNDING)
    assert report["CPU"].kv == pytest.approx(layer, abs=ROUNDING)
    assert report["RPC0"].weights == pytest.approx(planned(model, decisions), abs=ROUNDING)
    np.testing.assert_allclose(logits, all_in_ram(model), atol=1e-3)


@pytest.mark.parametrize("host_memory", ["plain", "pinned", "repacked", "mapped"])
def test_a_trained_model_computes_the_same_wherever_it_lives(
    converted: Converted, worker: Worker, run: Run, host_memory: HostMemory
) -> None:
    path = converted("DQ4")
    decisions = {
        "layers": {"RPC0": 3},
        "overrides": ((LENT, "RPC0"), (r"blk\.(4|5)\." + EXPERTS, "CPU")),
        "host_memory": host_memory,
        "workers": (worker.endpoint,),
    }
    logits, report = run(logits_and_report, path, decisions)
    expected = planned(path, decisions)
    assert report["RPC0"].weights == pytest.approx(expected, abs=ROUNDING)
    total = sum(tensor.nbytes for tensor in GGUFFile.open(path).tensors)
    assert report["CPU"].weights == pytest.approx(total - expected, abs=ROUNDING)
    if host_memory != "repacked":  # whose kernels round in other ways than the worker's
        np.testing.assert_allclose(logits, all_in_ram(path), atol=1e-3)


def test_without_a_placement_nothing_changes(converted: Converted) -> None:
    options: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "kv_type": "F32"}
    path = converted("DQ4")
    logits, _ = logits_and_report(path, None, flash_attention=False, **options)
    np.testing.assert_array_equal(logits, all_in_ram(path, "repacked"))


def planned(path: Path, decisions: Decisions) -> int:
    """Bytes of weights that RPC0 should have by llama.cpp's rules, which are written here again."""
    gguf = GGUFFile.open(path)
    blocks = gguf.keys["dots1.block_count"]
    assert isinstance(blocks, int)
    size = 0
    for tensor in gguf.tensors:
        block = re.match(r"blk\.(\d+)", tensor.name)
        layer = int(block[1]) if block else blocks
        counted = layer > blocks - decisions["layers"]["RPC0"] and "token_embd" not in tensor.name
        overrides = [dev for regex, dev in decisions["overrides"] if re.search(regex, tensor.name)]
        size += tensor.nbytes * ([*overrides, "RPC0" if counted else "CPU"][0] == "RPC0")
    return size


def test_given_parameters_replace_the_placements(model: Path) -> None:
    placement = placement_for(model, context=512)
    with Engine.open(model, placement=placement, threads=1) as engine:
        assert (engine.n_ctx, engine.n_ubatch) == (512, 64)
        assert engine.report["CPU"].kv == pytest.approx(3 * 512 * 2 * 64 * 4, abs=ROUNDING)
    options: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 32, "kv_type": "F16"}
    with Engine.open(model, placement=placement, threads=1, **options) as engine:
        assert (engine.n_ctx, engine.n_ubatch) == (256, 32)
        assert engine.report["CPU"].kv == pytest.approx(3 * 256 * 2 * 64 * 2, abs=ROUNDING)


def test_a_split_file_can_be_placed(tmp_path: Path, worker: Worker, run: Run) -> None:
    write_random_gguf(tmp_path / "model.gguf", shard_tensors=12)
    last = sorted(tmp_path.iterdir())[-1]
    decisions = {"layers": {"RPC0": 4}, "overrides": (), "workers": (worker.endpoint,)}
    logits, report = run(logits_and_report, last, decisions)
    assert report["RPC0"].weights == pytest.approx(planned(last, decisions), abs=ROUNDING)
    np.testing.assert_allclose(logits, all_in_ram(last), atol=1e-3)


def test_refuses_a_placement_for_another_file(model: Path) -> None:
    placement = placement_for(model)
    for other in (replace(placement, model_bytes=1), replace(placement, blocks=62)):
        with pytest.raises(UsageError, match=r"model.gguf .*plan again"):
            Engine.open(model, placement=other, threads=1)


@pytest.mark.parametrize(
    ("device", "remedy"),
    [
        ("SYCL0", 'CMAKE_ARGS="-DGGML_SYCL=on -DGGML_RPC=on" pip'),
        ("RPC9", "--worker"),
        ("BLAS", "plan again"),
    ],
)
def test_refuses_devices_that_are_not_there(model: Path, device: str, remedy: str) -> None:
    for decisions in ({"layers": {device: 1}}, {"overrides": ((EXPERTS, device),)}):
        with pytest.raises(UsageError, match=f"{device}; it has CPU.*{remedy}"):
            Engine.open(model, placement=placement_for(model, **decisions), threads=1)


def test_refuses_patterns_that_only_python_understands(model: Path) -> None:
    placement = placement_for(model, overrides=((r"(?P<part>exps)", "CPU"),))
    with pytest.raises(GGUFError, match="cannot load"):
        Engine.open(model, placement=placement, threads=1)


def test_names_a_worker_that_does_not_answer(model: Path) -> None:
    with pytest.raises(Dots1Error, match=r"127\.0\.0\.1:1;"):
        Engine.open(model, placement=placement_for(model, workers=("127.0.0.1:1",)), threads=1)


def test_out_of_memory_names_the_device_and_frees_everything(model: Path) -> None:
    with local_worker() as worker, ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        decisions = {"layers": {"RPC0": 4}, "workers": (worker.endpoint,)}
        fresh.submit(logits_and_report, model, decisions).result()
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
        found = re.search(r"VmSize:\s+(\d+) kB", status)
        assert found
        limit = int(found[1]) * 1024 + (64 << 20)
        resource.prlimit(worker.process.pid, resource.RLIMIT_AS, (limit, limit))
        with pytest.raises(OutOfMemory, match=r"RPC0 .* 201.3 MB") as error:
            fresh.submit(logits_and_report, model, decisions, n_ctx=1 << 17).result()
        assert (error.value.device, error.value.nbytes) == ("RPC0", 3 * 2 * 64 * 4 << 17)
        fresh.submit(logits_and_report, model, decisions).result()


def test_checks_free_memory_before_loading(model: Path, worker: Worker, run: Run) -> None:
    decisions = {"layers": {"RPC0": 4}, "workers": (worker.endpoint,)}
    with pytest.raises(OutOfMemory, match=r"RPC0 has 1\.0 kB free") as error:
        run(with_little_free, model, decisions)
    assert error.value.device == "RPC0"


def with_little_free(path: Path, decisions: Decisions) -> None:
    def never(done: int, total: int, unit: str, what: str) -> None:
        raise AssertionError("it loads")

    found = backends.device

    def little_free(name: str) -> backends.DeviceInfo:
        return replace(found(name), free=1000)

    with patch.object(backends, "device", little_free):
        Engine.open(path, placement=placement_for(path, **decisions), progress=never)


def test_checks_free_ram_for_the_kv_cache_before_loading(model: Path) -> None:
    # 3 layers, keys and values of 64 numbers in F16, 4 x 256 tokens
    needed = 3 * 2 * 64 * 2 * 1024
    options: dict[str, Any] = {"n_ctx": 256, "n_sequences": 4, "threads": 1}
    sentence = "RAM has 786,431 bytes free.* 4 × 256 tokens takes 786,432 bytes"
    with patch("dots1_local.engine.loading.available_ram") as ram:
        for shared in (False, True):
            ram.return_value = RAM(needed - 1, 1 << 30)
            with pytest.raises(OutOfMemory, match=sentence) as error:
                Engine.open(model, shared_cache=shared, **options)
            assert (error.value.device, error.value.nbytes) == ("CPU", 1)
            ram.return_value = RAM(needed, 1 << 30)
            Engine.open(model, shared_cache=shared, **options).close()
        ram.return_value = None  # on a system that does not tell
        Engine.open(model, **options).close()
        ram.return_value = RAM(0, 1 << 30)
        with pytest.raises(OutOfMemory, match="256 tokens"):
            Engine.open(model, placement=placement_for(model))


def test_compares_allocated_memory_with_the_prediction(model: Path) -> None:
    with Engine.open(model, placement=placement_for(model), threads=1) as engine:
        assert engine.warnings == ()
        expected = engine.predicted["CPU"]
        assert engine.report["CPU"].total == pytest.approx(
            expected.total - expected.scratch, rel=0.02, abs=ROUNDING
        )
    wrong = {"CPU": Usage(routed=1 << 30)}
    with (
        patch("dots1_local.engine.loading.footprint", return_value=wrong),
        Engine.open(model, placement=placement_for(model), threads=1) as engine,
    ):
        (warning,) = engine.warnings
    assert re.search(r"MB of CPU.* 1.1 GB", warning)


def test_can_be_interrupted_while_loading_to_a_worker(
    model: Path, worker: Worker, run: Run
) -> None:
    decisions = {"layers": {"RPC0": 4}, "workers": (worker.endpoint,)}
    assert run(interrupted, model, decisions) == "interrupted"
    run(logits_and_report, model, decisions)


def interrupted(path: Path, decisions: Decisions) -> str:
    def interrupt(done: int, total: int, unit: str, what: str) -> None:
        raise KeyboardInterrupt

    try:
        Engine.open(path, placement=placement_for(path, **decisions), progress=interrupt).close()
    except KeyboardInterrupt:
        return "interrupted"
    return "loaded"
