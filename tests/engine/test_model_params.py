"""What must be set before the engine starts, in child processes, because it is set only once."""

import ctypes
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import llama_cpp
import pytest

from dots1_local.devices import rpc
from dots1_local.engine.engine import Engine
from dots1_local.engine.model_params import has_moe_cache
from dots1_local.errors import Dots1Error
from tests.engine.test_loading import Decisions, placement_for
from tests.helpers import write_random_gguf
from tests.workers import local_worker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("params") / "model.gguf")


def test_one_worker_by_two_names_is_refused(model: Path) -> None:
    with local_worker() as worker, ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        names = (worker.endpoint, f"localhost:{worker.port}")
        decisions = {"layers": {"RPC0": 2, "RPC1": 2}, "workers": names}
        with pytest.raises(Dots1Error, match=f"localhost:{worker.port}.* {worker.endpoint}"):
            fresh.submit(impatient, model, decisions).result()


def impatient(path: Path, decisions: Decisions) -> None:
    with patch.object(rpc.probe, "__defaults__", (0.5,)):
        Engine.open(path, placement=placement_for(path, **decisions))


def test_connections_to_workers_are_kept_alive(model: Path) -> None:
    with local_worker() as worker, ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        decisions = {"layers": {"RPC0": 4}, "workers": (worker.endpoint,)}
        assert fresh.submit(kept_alive, model, decisions, worker.port).result() == [True]


def kept_alive(path: Path, decisions: Decisions, port: int) -> list[bool]:
    """Whether the kernel's timers of the engine's connections to a port are keep-alive's."""
    with Engine.open(path, placement=placement_for(path, **decisions)):
        table = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()
        rows = [line.split() for line in table if f" 0100007F:{port:04X} 01 " in line]
        return [row[5].startswith("02:") for row in rows]


def test_the_batch_that_fetches_weights_is_set_before_the_engine_starts(model: Path) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        for batch, warnings in ((64, 0), (64, 0), (128, 1)):
            assert fresh.submit(min_batch, model, batch).result() == ("64", warnings)


def min_batch(path: Path, batch: int) -> tuple[str, int]:
    placement = placement_for(path, offload_min_batch=batch)
    with Engine.open(path, placement=placement) as engine:
        return os.environ["GGML_OP_OFFLOAD_MIN_BATCH"], len(engine.warnings)


@pytest.mark.parametrize("field", ["moe_cache_size", "moe_cache_sizes", "op_offload"])
def test_the_cache_of_experts_is_found_by_its_field(field: str) -> None:
    """llama.cpp has `moe_cache_size` in the middle of llama_context_params from b11480 on."""

    class Params(ctypes.Structure):
        _fields_ = (
            ("n_ctx", ctypes.c_uint32), (field, ctypes.c_size_t), ("samplers", ctypes.c_void_p),
        )  # fmt: skip

    bindings = SimpleNamespace(llama_context_params=Params)
    assert has_moe_cache(bindings) is (field == "moe_cache_size")


def test_the_installed_engine_is_asked() -> None:
    header = [name for name, *_ in llama_cpp.llama_context_params._fields_]
    assert has_moe_cache() is ("moe_cache_size" in header)
