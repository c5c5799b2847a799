from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from llama_cpp import llama_cpp as llama

from dots1_local.devices.machine import find_hardware, this_machine
from dots1_local.engine.engine import Engine
from dots1_local.engine.loading import load_by_default
from dots1_local.engine.measure import (
    bench,
    measure_depths,
    measure_placement,
    predicted_depths,
)
from dots1_local.engine.model_params import EngineParams
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.alternatives import all_on_cpu, experts_in_ram
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import Placement
from dots1_local.placement.planner import place
from tests.helpers import write_random_gguf
from tests.workers import local_worker

DEPTHS = (40, 100)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("measure") / "model.gguf")


@pytest.fixture(scope="module")
def ours(model: Path) -> Placement:
    machine = find_hardware("cpu-96gb")
    return place(GGUFFile.open(model), machine, context=256, threads=1)


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    with Engine.open(model, n_ctx=128, n_ubatch=32, threads=1) as engine:
        yield engine


def test_measures_at_every_depth_and_forgets(engine: Engine) -> None:
    first = engine.decode([1, 2], 0).copy()
    found = measure_depths(engine, DEPTHS)
    assert [depth.tokens for depth in found] == list(DEPTHS)
    assert all(depth.prefill > 0 and depth.decode > 0 for depth in found)
    engine.forget()
    assert engine.decode([1, 2], 0).tolist() == first.tolist()


@pytest.mark.parametrize("depths", [(), (0,), (40, 40), (40, 30)])
def test_depths_must_ascend(engine: Engine, depths: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="ascend"):
        measure_depths(engine, depths)


def test_depths_must_leave_room_to_decode(engine: Engine) -> None:
    with pytest.raises(UsageError, match=r"128 tokens .*24 tokens after 105"):
        measure_depths(engine, [105])


def test_a_plan_for_several_sequences_has_room_for_all(model: Path, ours: Placement) -> None:
    found = measure_placement(model, replace(ours, context=128, sequences=4), DEPTHS)
    assert found.allocated["CPU"].kv == pytest.approx(512 * 3 * 2 * 64 * 2, abs=10_000)
    assert found.warnings == ()


def test_measures_a_worker_and_llama_cpp_by_itself(model: Path, ours: Placement) -> None:
    steps: list[tuple[int, int, str, str]] = []
    with local_worker() as worker:
        machine = this_machine([worker.endpoint], measure=False)
        placed = experts_in_ram(machine, ours, ())
        moved = measure_placement(model, placed, DEPTHS, progress=lambda *step: steps.append(step))
        alone = measure_placement(model, None, DEPTHS, workers=[worker.endpoint])
    assert [depth.tokens for depth in moved.depths] == list(DEPTHS)
    assert moved.allocated["RPC0"].weights > moved.allocated["CPU"].weights  # the embedding
    assert alone.allocated["RPC0"].weights == moved.allocated["RPC0"].weights
    assert ("tokens", "prefill to 100") in {step[2:] for step in steps}


def test_llama_cpp_by_itself_gets_the_threads(model: Path) -> None:
    gguf = GGUFFile.open(model)
    loaded = load_by_default(gguf, EngineParams.choose(gguf, None, n_ctx=128, threads=1))
    assert llama.llama_n_threads(loaded.context) == 1
    loaded.free()


def test_a_placement_that_fails_gives_a_result_with_the_error(model: Path, ours: Placement) -> None:
    graph, machine = ModelGraph.read(GGUFFile.open(model)), find_hardware("24gb-64gb")
    lost = experts_in_ram(machine, ours, ())
    bad = bench(graph, machine, "on no GPU", lost, DEPTHS)
    good = bench(graph, machine, "ours", ours, DEPTHS)
    assert bad.measurement is None
    assert "no device CUDA0" in (bad.error or "")
    assert good.measurement
    assert [depth.tokens for depth in good.predicted] == list(DEPTHS)
    assert good.error is None
    facts = good.to_json()
    assert [depth["tokens"] for depth in facts["measured"]] == list(DEPTHS)
    for each in facts["bytes"]:
        assert each["predicted"] == pytest.approx(each["real"], abs=1 << 20)


def test_a_measurement_names_a_file_that_cannot_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(Dots1Error, match=r"model\.gguf is not a GGUF file"):
        measure_placement(path, None, DEPTHS)


def test_predicts_nothing_for_an_unmeasured_machine(model: Path, ours: Placement) -> None:
    graph = ModelGraph.read(GGUFFile.open(model))
    machine = this_machine(measure=False)
    assert predicted_depths(graph, machine, all_on_cpu(ours), DEPTHS) == ()
