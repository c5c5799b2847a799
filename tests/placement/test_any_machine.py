"""Properties of every placement, for any machine, model and options."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import Hardware, Rate
from dots1_local.devices.machine import find_hardware
from dots1_local.errors import UsageError
from dots1_local.files.gguf import GGUFFile, role_of
from dots1_local.placement.alternatives import explain_shortfall
from dots1_local.placement.footprint import GPU_RESERVE, RAM_RESERVE, footprint
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import Placement, placement_from_json
from dots1_local.placement.planner import place
from tests.engine.sparse_gguf import write_sparse_gguf
from tests.placement.machines import GB, machine, speed
from tools.make_wide import published_config

REAL = Dots1Config.from_json(published_config())
ROLES = ("embedding", "head", "attention", "dense", "shared", "routed")
TYPES: dict[str, dict[str, str]] = {
    "Q8_0": dict.fromkeys(ROLES, "Q8_0"),
    "mixed": dict.fromkeys(ROLES, "Q8_0") | {"routed": "Q4_K", "ffn_down_exps": "Q5_0"},
    "padded": dict.fromkeys(ROLES, "Q8_0") | {"routed": "IQ2_XXS", "ffn_down_exps": "IQ3_XXS"},
}
CASES = [("Q8_0", 2), ("mixed", 5), ("padded", 9), ("Q8_0", 62), ("mixed", 62), ("padded", 62)]
# What std::regex and Python's re read alike: letters, dots, classes, groups, | and (?!...).
PATTERN = re.compile(r"blk\\\.(?:\(\?!|\(|\)|\||\[[\d-]+\]|\.\*|\\\.|[a-z_\d])+")
KV_TYPES = ("F32", "F16", "Q8_0", "Q4_0")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[GGUFFile]:
    folder = tmp_path_factory.mktemp("any")
    found = []
    for name, layers in CASES:
        config, width = replace(REAL, num_hidden_layers=layers), 1536 if name == "padded" else None
        path = folder / f"{name}-{layers}.gguf"
        write_sparse_gguf(path, config, TYPES[name], width, vocabulary=False)
        found.append(GGUFFile.open(path))
    return found


@st.composite
def machines(draw: st.DrawFn) -> Hardware:
    size = st.integers(4, 96).map(lambda n: n * GB)
    gpus = draw(st.lists(size, max_size=3))
    workers = draw(st.lists(size, max_size=2))
    ram = draw(st.integers(8, 512)) * GB
    if draw(st.booleans()):
        return machine(ram, tuple(gpus), tuple(workers))
    pace = st.sampled_from((1e8, 1e9, 1e10, 1e11, 1e12))
    rates = {kind: Rate(draw(pace), draw(pace)) for kind in ("Q4_K", "Q8_0")}
    kv = dict.fromkeys(KV_TYPES, Rate(draw(pace), draw(pace)))
    cpu, gpu, worker = (
        speed(draw(pace), matmul=rates, attention=kv, node=1e-6, split=1e-4, upload=draw(pace),
              upload_pageable=draw(pace))
        for _ in range(3)
    )  # fmt: skip
    return machine(ram, tuple(gpus), tuple(workers), cpu=cpu, gpu=gpu, worker=worker)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), hardware=machines())
def test_a_placement_for_any_machine_is_sound(
    models: list[GGUFFile], data: st.DataObject, hardware: Hardware
) -> None:
    model = models[data.draw(st.integers(0, len(models) - 1))]
    context = data.draw(st.sampled_from((None, 1, 256, 1000, 8192, 32768, 131072, 1 << 20)))
    kv_type = data.draw(st.sampled_from((None, *KV_TYPES)))
    placement = place(model, hardware, context=context, kv_type=kv_type)
    check_memory(model, hardware, placement)
    check_order(model, placement)
    assert all(PATTERN.fullmatch(pattern) for pattern, _ in placement.overrides)
    raw = json.loads(json.dumps(placement.to_json()))
    assert placement_from_json(raw, "plan") == placement


def check_memory(model: GGUFFile, hardware: Hardware, placement: Placement) -> None:
    """Check that only RAM can lack memory; this is reported, and the file is mapped then."""
    over = []
    for name, usage in footprint(ModelGraph.read(model), placement).items():
        margin = GPU_RESERVE if name.startswith("CUDA") else RAM_RESERVE
        over += [name] if usage.total > hardware.device(name).free - margin else []
    assert over in ([], ["CPU"])
    said = explain_shortfall(ModelGraph.read(model), hardware, placement)
    assert (said is not None) == (placement.host_memory == "mapped") == bool(over)


def check_order(model: GGUFFile, placement: Placement) -> None:
    layers: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for tensor in model.tensors:
        if tensor.name.startswith("blk."):
            kind = placement.device_of(tensor.name)[:3]
            layers[kind, str(role_of(tensor.name))].add(int(tensor.name.split(".")[1]))
    if routed := layers["CUD", "routed"]:
        assert not layers["CPU", "router"] | layers["CPU", "shared"]
        assert max(routed) <= min(layers["CPU", "routed"], default=62)
    fetches = any(name.startswith("CUDA") for name in placement.layers)
    in_ram = any(layers["CPU", role] for role in ("attention", "dense", "shared", "routed", "norm"))
    least = placement.offload_min_batch
    assert (least is not None) == (fetches and in_ram)
    assert least is None or least >= 64  # heads are rows: with 32, each token's would be fetched


def test_decoding_does_not_fetch_norms(models: list[GGUFFile]) -> None:
    slow, fast = speed(1e8), speed(1e12, upload=1e12, upload_pageable=1e12)
    for cpu, gpu in ((slow, fast), (None, None)):
        hardware = machine(200 * GB, (12 * GB,), cpu=cpu, gpu=gpu)
        placement = place(models[4], hardware)
        assert placement.device_of("blk.0.ffn_up_exps.weight") == "CPU"
        assert placement.offload_min_batch == 64


def test_a_placement_that_fetches_nothing_fits_too(models: list[GGUFFile]) -> None:
    # Where nothing is fetched, buffers are larger on a GPU that gets what experts in RAM made.
    shipped = find_hardware("2x24gb-128gb")
    gpu = shipped.devices[0].speed
    assert gpu
    slow = replace(gpu, upload=1e8, upload_pageable=1e8)
    hardware = machine(300 * GB, (82 * GB, 9 * GB), cpu=shipped.cpu.speed, gpu=slow)
    placement = place(models[3], hardware, context=131072)
    check_memory(models[3], hardware, placement)


@pytest.mark.parametrize("context", [1 << 20, 1 << 24])
def test_contexts_that_do_not_fit_any_gpu(models: list[GGUFFile], context: int) -> None:
    hardware = machine(128 * GB, (24 * GB,))
    placement = place(models[4], hardware, context=context)
    check_memory(models[4], hardware, placement)


@pytest.mark.parametrize("context", [0, -1, (1 << 24) + 1])
def test_impossible_contexts_are_refused(models: list[GGUFFile], context: int) -> None:
    with pytest.raises(UsageError, match="1 to 16,777,216 tokens"):
        place(models[0], machine(), context=context)


def test_a_gpu_does_not_get_a_kv_cache_that_it_cannot_read(models: list[GGUFFile]) -> None:
    # ggml_cuda_fattn_kv_type_supported of ggml-cuda/fattn.cu lists all but IQ4_NL
    def planned(gpus: Sequence[int], **speeds: Any) -> Placement:
        return place(models[1], machine(gpus=tuple(gpus), **speeds), kv_type="iq4_nl")

    with pytest.raises(UsageError, match=r"CUDA0 .* IQ4_NL; .*F16"):
        planned([24 * GB])
    some = speed(1e12, upload=1e9)
    with pytest.raises(UsageError, match=r"CUDA0 .* IQ4_NL; .*F16, Q8_0"):
        planned([24 * GB], cpu=speed(1e9), gpu=some)
    assert planned([]).kv_type == "IQ4_NL"
    able = speed(1e12, attention={"IQ4_NL": Rate(1e9, 1e9)}, upload=1e9)
    assert planned([24 * GB], cpu=speed(1e9), gpu=able).kv_type == "IQ4_NL"
