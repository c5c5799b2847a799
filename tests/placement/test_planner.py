"""Placements of the real geometry, checked by sums over their tensors."""

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dots1_local.architecture import Dots1Config
from dots1_local.devices.hardware import Hardware, Rate, Speed
from dots1_local.errors import UsageError
from dots1_local.files.gguf import GGUFFile, role_of
from dots1_local.placement.alternatives import Shortfall, explain_shortfall
from dots1_local.placement.footprint import GPU_RESERVE, RAM_RESERVE, footprint, kv_bytes
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import Placement, load_placement
from dots1_local.placement.planner import place
from tests.engine.sparse_gguf import write_sparse_gguf
from tests.helpers import write_random_gguf
from tests.placement.machines import GB, machine, speed
from tools.make_wide import published_config

REAL = Dots1Config.from_json(published_config())
# 89.9 GB: routed experts 50.7 GB of gate and up, 31.0 GB of down, the rest 8.2 GB.
FOUR_BITS = {
    "embedding": "Q8_0", "head": "Q8_0", "attention": "Q8_0", "dense": "Q8_0", "shared": "Q8_0",
    "routed": "Q4_K", "ffn_down_exps": "Q5_0",
}  # fmt: skip
MATMUL = {"Q4_K": Rate(2e11, 6e11), "Q8_0": Rate(1e11, 6e11)}
CPU_SPEED = speed(60e9, matmul=MATMUL, split=1e-5)
GPU_SPEED = speed(900e9, matmul={"Q4_K": Rate(2e12, 4e13)}, split=1e-5, node=2e-6,
                  upload=24e9, upload_pageable=8e9)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    folder = tmp_path_factory.mktemp("planner")
    return GGUFFile.open(write_sparse_gguf(folder / "real.gguf", REAL, FOUR_BITS))


def gpus(*sizes: int, ram: int = 128, **options: Any) -> Hardware:
    options = {"cpu": CPU_SPEED, "gpu": GPU_SPEED, **options}
    return machine(ram * GB, tuple(size * GB for size in sizes), **options)


def held(model: GGUFFile, placement: Placement) -> dict[str, dict[str, int]]:
    """Bytes by device and role, including the KV cache."""
    sums: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for tensor in model.tensors:
        sums[placement.device_of(tensor.name)][str(role_of(tensor.name))] += tensor.nbytes
    layer = kv_bytes(REAL, placement.context, placement.kv_type) // 62
    for number in range(62):
        sums[placement.device_of_layer(number)]["kv"] += layer
    return {name: dict(roles) for name, roles in sums.items()}


def layers_on(model: GGUFFile, placement: Placement, device: str, part: str) -> list[int]:
    return [
        int(tensor.name.split(".")[1])
        for tensor in model.tensors
        if f".{part}." in tensor.name and placement.device_of(tensor.name) == device
    ]


def test_a_gpu_has_what_every_token_reads_and_the_first_experts(model: GGUFFile) -> None:
    placement = place(model, gpus(24))
    by_device = held(model, placement)
    assert set(by_device["CPU"]) == {"embedding", "routed"}
    on_gpu = layers_on(model, placement, "CUDA0", "ffn_up_exps")
    assert on_gpu == list(range(1, len(on_gpu) + 1))
    # as much as there is room for: what is left is less than the smallest matrix, and buffers
    room = 24 * GB - GPU_RESERVE - sum(by_device["CUDA0"].values())
    assert 0 < room < 415_000_000 + 1_600_000_000
    assert (placement.context, placement.threads) == (16384, 8)
    assert placement.host_memory == "pinned"
    assert placement.model_bytes == model.nbytes


def test_only_one_layer_is_divided(model: GGUFFile) -> None:
    for vram in (15, 18, 19, 22, 24):
        placement = place(model, gpus(24), vram=vram * GB)
        parts = [
            layers_on(model, placement, "CUDA0", f"ffn_{part}_exps")
            for part in ("up", "gate", "down")
        ]
        whole = set.intersection(*map(set, parts))
        assert len(set.union(*map(set, parts)) - whole) <= 1
        for layers in parts:
            assert all(after == before + 1 for before, after in pairwise(layers))


def test_the_kv_cache_is_quantised_only_if_it_must_be(model: GGUFFile) -> None:
    # 16k tokens take 16.6 GB in F16 and 8.8 GB in Q8_0, other weights of every token 7.6 GB.
    assert place(model, gpus(32)).kv_type == "F16"
    assert place(model, gpus(24)).kv_type == "Q8_0"
    assert place(model, gpus(24), context=8192).kv_type == "F16"
    assert place(model, gpus(24), kv_type="f16").kv_type == "F16"
    assert place(model, gpus()).kv_type == "F16"
    with pytest.raises(UsageError, match=r"Q4_K; .*F32, F16"):
        place(model, gpus(24), kv_type="q4_k")


@pytest.mark.parametrize("vram", [4, 7, 10, 12, 16])
def test_routers_and_shared_experts_come_before_routed_ones(model: GGUFFile, vram: int) -> None:
    for hardware in (gpus(vram), gpus(vram, cpu=None, gpu=None)):
        placement = place(model, hardware)
        by_device = held(model, placement)
        if "routed" in by_device.get("CUDA0", {}):
            assert not {"shared", "router"} & set(by_device["CPU"])
        assert sum(by_device["CUDA0"].values()) < vram * GB - GPU_RESERVE


def test_layers_whose_kv_cache_is_in_ram_compute_attention_there(model: GGUFFile) -> None:
    placement = place(model, gpus(12))
    in_ram = [layer for layer in range(62) if placement.device_of_layer(layer) == "CPU"]
    assert in_ram == list(range(len(in_ram)))
    assert 0 < len(in_ram) < 62
    for layer in in_ram:
        assert placement.device_of(f"blk.{layer}.attn_output.weight") == "CPU"
    on_gpu = layers_on(model, placement, "CUDA0", "attn_q")
    assert set(on_gpu) & set(in_ram)


def test_a_kv_cache_that_the_cpu_reads_slowly_stays_on_the_gpu(model: GGUFFile) -> None:
    slow = speed(60e9, matmul=MATMUL, attention={"Q8_0": Rate(5e9, 5e9)})
    placement = place(model, gpus(12, cpu=slow))
    by_device = held(model, placement)
    assert "kv" not in by_device["CPU"]
    assert "routed" not in by_device["CUDA0"]
    in_ram = layers_on(model, placement, "CPU", "attn_q")
    assert in_ram == list(range(len(in_ram)))
    for layer in in_ram:
        assert placement.device_of(f"blk.{layer}.attn_norm.weight") == "CUDA0"


def test_two_gpus_share_layers_unevenly(model: GGUFFile) -> None:
    placement = place(model, gpus(24, 24))
    by_device = held(model, placement)
    first, second = placement.layers["CUDA0"], placement.layers["CUDA1"]
    assert first + second == 63
    assert first < second  # the first has whole layers, the last has the others without experts
    whole = layers_on(model, placement, "CUDA0", "ffn_down_exps")
    assert whole[: first - 1] == list(range(1, first))
    assert set(by_device["CPU"]) == {"embedding", "routed"}
    for name in ("CUDA0", "CUDA1"):
        assert 20 * GB < sum(by_device[name].values()) < 23 * GB


def test_a_model_that_fits_the_gpus_is_there_as_a_whole(model: GGUFFile) -> None:
    placement = place(model, gpus(80, 80))
    assert set(held(model, placement)["CPU"]) == {"embedding"}
    assert placement.overrides == ()
    assert placement.gpu_layers == 63


def test_without_a_gpu_ram_holds_everything(model: GGUFFile) -> None:
    placement = place(model, gpus())
    assert (dict(placement.layers), placement.overrides) == ({}, ())
    assert (placement.host_memory, placement.offload_min_batch) == ("repacked", None)


def test_an_unmeasured_machine_gets_a_placement_of_the_same_order(model: GGUFFile) -> None:
    placement = place(model, gpus(24, cpu=None, gpu=None))
    assert set(held(model, placement)["CPU"]) == {"embedding", "routed"}
    assert (placement.ubatch, placement.offload_min_batch) == (512, 64)


def test_a_slow_bus_and_a_fast_cpu_leave_experts_where_they_are(model: GGUFFile) -> None:
    slow_bus = replace(GPU_SPEED, upload=1e9, upload_pageable=1e9)
    fast = speed(500e9, matmul={"Q4_K": Rate(2e12, 3e13)}, repacked={"Q4_K": Rate(2e12, 3e13)})
    placement = place(model, gpus(24, cpu=fast, gpu=slow_bus))
    assert placement.offload_min_batch is None or placement.offload_min_batch > placement.ubatch
    assert place(model, gpus(24)).offload_min_batch in range(2, 4096)


def test_a_worker_is_used_where_it_helps(model: GGUFFile) -> None:
    def far(bandwidth: float) -> Speed:
        return speed(bandwidth, split=3e-4, upload=1e8, upload_pageable=1e8)

    fast = gpus(24, workers=(64 * GB,), worker=far(900e9))
    assert place(model, fast).workers == ("10.0.0.1:50052",)
    slow = gpus(24, workers=(64 * GB,), worker=far(20e9))
    assert place(model, slow).workers == ()
    needed = gpus(24, ram=48, workers=(64 * GB,), worker=far(20e9))
    placement = place(model, needed)
    assert placement.workers == ("10.0.0.1:50052",)
    assert sum(held(model, placement)["CPU"].values()) < 48 * GB - RAM_RESERVE


def test_two_machines_without_gpus_share_a_model(model: GGUFFile) -> None:
    hardware = gpus(ram=64, workers=(64 * GB,), worker=CPU_SPEED)
    hardware = replace(hardware, devices=tuple(
        replace(each, speed=speed(60e9, upload=1e8, upload_pageable=1e8)) for each in
        hardware.devices))  # fmt: skip
    placement = place(model, hardware)
    by_device = held(model, placement)
    assert sum(by_device["RPC0"].values()) < 62 * GB
    assert sum(by_device["CPU"].values()) < 62 * GB
    assert explain_shortfall(ModelGraph.read(model), hardware, placement) is None


def test_limits(model: GGUFFile) -> None:
    placement = place(model, gpus(24), vram=20 * GB)
    assert sum(held(model, placement)["CUDA0"].values()) < 20 * GB - GPU_RESERVE
    assert place(model, gpus(), ram=64 * GB).host_memory == "mapped"
    assert place(model, gpus(24), threads=3).threads == 3


def test_each_sequence_has_room_for_its_context(model: GGUFFile) -> None:
    placement = place(model, gpus(24), sequences=4, context=4096)
    assert (placement.sequences, placement.context, placement.tokens) == (4, 4096, 16384)
    graph = ModelGraph.read(model)
    usage, alone = footprint(graph, placement), footprint(graph, place(model, gpus(24)))
    assert placement.kv_type == "Q8_0"
    assert usage["CUDA0"].kv == alone["CUDA0"].kv == 16384 * 539_648
    assert usage["CUDA0"].total <= 24 * GB - GPU_RESERVE
    # a row of logits for each of them, where one has one
    same = footprint(graph, replace(placement, sequences=1, context=16384))
    assert usage["CPU"].scratch - same["CPU"].scratch == 3 * 4 * 152_064


@pytest.mark.parametrize(("sequences", "context"), [(1, 16384), (2, 8192), (4, 4096), (16, 4096)])
def test_the_default_context_is_divided_among_sequences(
    model: GGUFFile, sequences: int, context: int
) -> None:
    placement = place(model, gpus(ram=512), sequences=sequences)
    assert (placement.sequences, placement.context) == (sequences, context)


def test_decoding_several_sequences_does_not_fetch_norms(model: GGUFFile) -> None:
    # 4 tokens have 128 rows of heads, so that with 64 those of layers in RAM would be fetched
    unmeasured = gpus(12, cpu=None, gpu=None)
    assert place(model, unmeasured).offload_min_batch == 64
    assert place(model, unmeasured, sequences=4).offload_min_batch == 160
    assert place(model, unmeasured, sequences=64).offload_min_batch == 512


@pytest.mark.parametrize(("sequences", "sentence"), [
    (0, "1 to 256 sequences .*, not 0"), (257, "not 257"),
    (256, "256 × 16,777,216 tokens"),
])  # fmt: skip
def test_impossible_numbers_of_sequences_are_refused(
    model: GGUFFile, sequences: int, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        place(model, gpus(24), context=1 << 24, sequences=sequences)


def test_a_plan_can_be_kept_in_a_file(model: GGUFFile, tmp_path: Path) -> None:
    placement = place(model, gpus(24, 12))
    (tmp_path / "plan.json").write_text(json.dumps(placement.to_json()))
    assert load_placement(tmp_path / "plan.json") == placement


def test_a_small_model_needs_no_special_case(tmp_path: Path) -> None:
    tiny = GGUFFile.open(write_random_gguf(tmp_path / "tiny.gguf"))
    placement = place(tiny, gpus(24, cpu=None, gpu=None))
    assert placement.context == 1024
    assert placement.gpu_layers == 4
    assert place(tiny, gpus(24), context=8).context == 8


def short(model: GGUFFile, hardware: Hardware, **options: Any) -> Shortfall:
    shortfall = explain_shortfall(
        ModelGraph.read(model), hardware, place(model, hardware, **options)
    )
    assert shortfall is not None
    return shortfall


def test_says_what_is_short_and_what_would_fit(model: GGUFFile) -> None:
    hardware = gpus(ram=96, disk=2e9)
    found = short(model, hardware)
    # 89.9 GB and 8.8 GB of KV cache (Q8_0) in 94 GB that may be used, besides buffers
    over = model.nbytes + 16384 * 539_648 - 94 * GB
    assert over < found.lacks < over + 500_000_000
    assert found.device == "CPU"
    assert found.context is not None
    assert place(model, hardware, context=found.context, kv_type="Q8_0").host_memory == "repacked"
    more = found.context + 1024
    assert place(model, hardware, context=more, kv_type="Q8_0").host_memory == "mapped"
    assert found.file_bytes == model.nbytes - found.lacks
    # a token reads 7.5 GB besides its share of the experts (6 of 128 in 81.7 GB), 5% from disk
    assert found.share_on_disk == pytest.approx(found.lacks / model.nbytes, rel=0.1)
    assert found.decode is not None
    assert found.share_on_disk is not None
    disk_seconds = found.share_on_disk * (7.54e9 + 81.7e9 * 6 / 128) / 2e9
    assert disk_seconds < 1 / found.decode < disk_seconds + 0.5
    assert f"RAM lacks {found.lacks / 1e9:.1f} GB; a context of" in str(found)
    assert "of what RAM has to hold read from disk at 2.0 GB/s, it would write" in str(found)


def test_says_which_context_of_each_sequence_would_fit(model: GGUFFile) -> None:
    hardware = gpus(ram=96)
    found = short(model, hardware, sequences=4, context=4096)
    alone = short(model, hardware, context=16384)
    assert found.lacks == pytest.approx(alone.lacks, abs=10_000_000)  # logits and more of a ubatch
    assert found.context == pytest.approx((alone.context or 0) / 4, abs=1024)
    assert f"; a context of 4 × {found.context:,} tokens" in str(found)
    placement = place(model, hardware, context=found.context, sequences=4, kv_type="Q8_0")
    assert placement.host_memory == "repacked"


def test_names_a_narrower_kv_type_that_would_fit(model: GGUFFile) -> None:
    found = short(model, gpus(ram=102), kv_type="F16")
    assert found.kv_type == "Q8_0"
    assert place(model, gpus(ram=102), kv_type="Q8_0").host_memory == "repacked"


def test_a_much_too_large_model_still_gets_a_placement(model: GGUFFile) -> None:
    hardware = gpus(8, ram=16, cpu=None, gpu=None)
    placement = place(model, hardware)
    assert placement.host_memory == "mapped"
    found = short(model, hardware)
    assert (found.context, found.kv_type, found.decode) == (None, None, None)
    assert "would fit" in str(found)


def test_a_placement_that_fits_lacks_nothing(model: GGUFFile) -> None:
    hardware = gpus(24)
    placement = place(model, hardware)
    assert explain_shortfall(ModelGraph.read(model), hardware, placement) is None
    edited = replace(placement, overrides=())  # all experts on the GPU
    found = explain_shortfall(ModelGraph.read(model), hardware, edited)
    assert found is not None
    assert found.device == "CUDA0"
    assert str(found).startswith("it does not fit: CUDA0 lacks 7")
