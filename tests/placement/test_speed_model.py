"""Compare predicted seconds with calculations by hand, and splits with llama.cpp's."""

from dataclasses import replace
from pathlib import Path

import pytest

from dots1_local.devices.hardware import Hardware, Rate
from dots1_local.errors import GGUFError
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.footprint import RAM_RESERVE
from dots1_local.placement.llama_args import (
    expert_overrides,
    gpu_weight_overrides,
    ram_weight_overrides,
)
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.placement.placement import HostMemory, Placement
from dots1_local.placement.speed_model import SpeedModel, is_measured
from tests.helpers import CONFIG, write_random_gguf
from tests.placement.machines import GB, machine, speed

# Bytes that one token reads, everything being F32: 3 layers' attention (4 matrices of 64 x 64), the
# dense layer (3 of 64 x 96), 2 layers' routers (8 x 64), shared experts (3 of 64 x 64) and 2 of 8
# routed ones (3 of 64 x 32), the head (268 x 64).
ATTENTION, DENSE, ROUTER, SHARED = 65_536, 73_728, 2_048, 49_152
ROUTED = 196_608  # all 8
HEAD = 68_608
ALWAYS = 3 * ATTENTION + DENSE + 2 * (ROUTER + SHARED)
CELL = 3 * 2 * 64 * 2  # 3 layers' keys and values of 64 numbers in F16
ALL_ON_CPU = ALWAYS + 2 * ROUTED // 4 + HEAD
# Of these, what is after the last attention is only computed for the last token of a prompt.
FOR_LOGITS = ROUTER + SHARED + ROUTED // 4 + HEAD
FOR_ALL = ALWAYS - ROUTER - SHARED  # without the first MoE layer's experts


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> ModelGraph:
    path = write_random_gguf(tmp_path_factory.mktemp("speed") / "model.gguf")
    return ModelGraph.read(GGUFFile.open(path))


CPU_ONLY = Placement(
    model="model.gguf",
    model_bytes=1,
    blocks=3,
    context=1024,
    kv_type="F16",
    flash_attention=True,
    ubatch=512,
    threads=1,
    host_memory="plain",
)
EXPERTS_IN_RAM = replace(
    CPU_ONLY, layers={"CUDA0": 4}, overrides=(("_exps", "CPU"),), host_memory="pinned"
)


def one_gpu(*, split: float = 0, upload: float = 4e6) -> Hardware:
    gpu = speed(1e9, split=split, upload=upload, upload_pageable=2e6)
    return machine(gpus=(GB,), cpu=speed(1e6), gpu=gpu)


def test_decode_reads_every_active_byte_once(graph: ModelGraph) -> None:
    model = SpeedModel(graph, machine(cpu=speed(1e6)), CPU_ONLY)
    assert ALL_ON_CPU == 539_648
    assert model.decode(99) == pytest.approx((ALL_ON_CPU + 100 * CELL) / 1e6)


def test_the_kv_type_counts(graph: ModelGraph) -> None:
    model = SpeedModel(graph, machine(cpu=speed(1e6)), replace(CPU_ONLY, kv_type="Q8_0"))
    assert model.decode(99) == pytest.approx((ALL_ON_CPU + 100 * CELL * 34 / 64) / 1e6)


def test_arithmetic_counts_if_it_takes_longer_than_reading(graph: ModelGraph) -> None:
    slow = speed(1e18, matmul={"F32": Rate(1e6, 1e6)}, attention={"F16": Rate(5e5, 5e5)})
    model = SpeedModel(graph, machine(cpu=slow), CPU_ONLY)
    attention = 3 * 2 * 64 * 100 / 5e5  # 100 keys and values of 64 numbers in 3 layers
    assert model.decode(99) == pytest.approx(ALL_ON_CPU / 4 / 1e6 + attention)


def test_a_batch_reads_the_experts_that_it_touches(graph: ModelGraph) -> None:
    model = SpeedModel(graph, machine(cpu=speed(1e6)), CPU_ONLY)
    touched = 1 - (6 / 8) ** 3  # three tokens choose 2 of 8 each
    nbytes = FOR_ALL + ROUTED * touched + 3 * CELL + FOR_LOGITS
    assert model.prefill(3) == pytest.approx(nbytes / 1e6)


def test_a_prompt_is_read_in_ubatches(graph: ModelGraph) -> None:
    model = SpeedModel(graph, machine(cpu=speed(1e6)), replace(CPU_ONLY, ubatch=2))
    touched = ROUTED * (1 - (6 / 8) ** 2)
    nbytes = 2 * (FOR_ALL + touched) + (12 + 14) * CELL + FOR_LOGITS  # after 10 tokens
    assert model.prefill(4, 10) == pytest.approx(nbytes / 1e6)


def test_unpacking_is_paid_once_a_batch(graph: ModelGraph) -> None:
    rates = {"F32": Rate(decode=1e6, prefill=3e6)}  # 24 uses of a weight take as long as 8 single
    model = SpeedModel(graph, machine(cpu=speed(1e18, matmul=rates)), CPU_ONLY)
    weights, for_logits = (FOR_ALL + ROUTED / 4) / 4, FOR_LOGITS / 4 / 1e6
    assert model.prefill(1) == pytest.approx(weights / 1e6 + for_logits)
    assert model.prefill(480) == pytest.approx(weights * 480 / 3e6 + for_logits)


def test_devices_take_turns(graph: ModelGraph) -> None:
    hardware = one_gpu(split=0.25, upload=1e18)
    hardware = replace(hardware, cpu=replace(hardware.cpu, speed=speed(1e6, split=0.5)))
    model = SpeedModel(graph, hardware, EXPERTS_IN_RAM)
    # the embedding, twice the experts; what is before, between and after them
    assert model.decode(0) == pytest.approx(3 * 0.5 + 3 * 0.25 + 2 * ROUTED / 4 / 1e6, rel=1e-3)


def test_what_crosses_the_bus(graph: ModelGraph) -> None:
    model = SpeedModel(graph, one_gpu(), EXPERTS_IN_RAM)
    # 64 floats from the embedding; for 2 layers' experts 64 go and 2 x 64 come back
    floats = 64 + 2 * (64 + 128)
    on_gpu = (ALWAYS + HEAD + CELL) / 1e9
    seconds = 4 * floats / 4e6 + 2 * ROUTED / 4 / 1e6 + on_gpu
    assert model.decode(0) == pytest.approx(seconds)


@pytest.mark.parametrize(("held", "rate"), [("pinned", 4e6), ("mapped", 2e6)])
def test_long_batches_fetch_experts(graph: ModelGraph, held: HostMemory, rate: float) -> None:
    placement = replace(EXPERTS_IN_RAM, host_memory=held, offload_min_batch=100)
    model = SpeedModel(graph, one_gpu(), placement)
    embedding = 4 * 64 * 200 / 4e6
    on_gpu = (ALWAYS + ROUTED + 200 * CELL + HEAD) / 1e9  # all experts are touched
    last = ROUTED / 4 / 1e6 + 4 * (64 + 128) / 4e6  # by the CPU, for one token
    seconds = ROUTED / rate + embedding + on_gpu + last
    assert model.prefill(200) == pytest.approx(seconds, rel=1e-6)
    assert model.prefill(99) > ROUTED / 1e6


def test_repacked_weights_are_not_fetched(graph: ModelGraph) -> None:
    repacked = replace(EXPERTS_IN_RAM, host_memory="repacked", offload_min_batch=1)
    ops = tuple(replace(op, type="Q8_0") for op in graph.ops)
    model = SpeedModel(replace(graph, ops=ops), one_gpu(), repacked)
    assert model.prefill(200) > 1.25 * ROUTED / 1e6
    # llama.cpp has no other form of F32, whose experts lie in plain memory then
    model = SpeedModel(graph, one_gpu(), repacked)
    assert model.prefill(200) == pytest.approx(ROUTED / 2e6 + ROUTED / 4 / 1e6, rel=0.1)


def test_a_gpu_without_layers_fetches_too(graph: ModelGraph) -> None:
    head = replace(CPU_ONLY, overrides=(("^output.weight", "CUDA0"),), offload_min_batch=64)
    model = SpeedModel(graph, one_gpu(upload=1e18), replace(head, host_memory="pinned"))
    # all but the KV cache, which is copied, as that of layers in RAM is; not for the last token
    last = (FOR_LOGITS - HEAD) / 1e6
    assert model.prefill(200) == pytest.approx(200 * CELL / 2e6 + last, rel=0.02)


def test_norms_by_head_have_a_row_for_each_head(graph: ModelGraph) -> None:
    # 2 heads: up to a minimum of 2 each token's q and k go to the GPU and back, in 3 layers
    hardware = one_gpu(split=1.0, upload=1e18)
    placement = replace(CPU_ONLY, layers={"CUDA0": 1}, offload_min_batch=3)
    before = SpeedModel(graph, hardware, placement).decode(0)
    fetching = SpeedModel(graph, hardware, replace(placement, offload_min_batch=2))
    assert fetching.decode(0) == pytest.approx(before + 3 * 2 * 1.0, rel=1e-3)


def test_repacked_weights_have_rates_of_their_own(graph: ModelGraph) -> None:
    rates = {"F32": Rate(1e6, 1e6)}
    cpu = speed(1e18, matmul=rates, repacked={"F32": Rate(2e6, 2e6)})
    plain = SpeedModel(graph, machine(cpu=cpu), CPU_ONLY)
    repacked = SpeedModel(graph, machine(cpu=cpu), replace(CPU_ONLY, host_memory="repacked"))
    assert repacked.decode(0) == pytest.approx(plain.decode(0) / 2)


def test_break_even_is_where_fetching_begins_to_pay(graph: ModelGraph) -> None:
    # 8 times as slow as reading from RAM, but on a GPU that computes without taking any time.
    cpu = speed(8e6, matmul={"F32": Rate(8e6 / 4, 8e6 / 4)})
    gpu = speed(1e18, upload=1e6, upload_pageable=1e6)
    model = SpeedModel(graph, machine(gpus=(GB,), cpu=cpu, gpu=gpu), EXPERTS_IN_RAM)
    # fetching all experts takes 0.393 s, n tokens take n / 4 x 0.049 s where they lie
    assert model.break_even() == 32


def test_weights_that_do_not_fit_ram_come_from_disk(graph: ModelGraph) -> None:
    path = graph.path
    weights = sum(tensor.nbytes for tensor in graph.tensors)
    kv, compute = 1024 * CELL, 2_000_000
    ram = RAM_RESERVE + kv + compute + weights // 2
    hardware = machine(ram, cpu=speed(1e18), disk=1e6)
    model = SpeedModel(graph, hardware, replace(CPU_ONLY, host_memory="mapped"))
    assert 0 < model.share_on_disk < 1, path
    assert model.decode(0) == pytest.approx(model.share_on_disk * ALL_ON_CPU / 1e6, rel=1e-3)


def test_attention_over_a_kv_cache_in_ram_stays_on_the_cpu(graph: ModelGraph) -> None:
    on_gpu = replace(EXPERTS_IN_RAM, layers={"CUDA0": 1}, overrides=tuple(gpu_weight_overrides(
        dict.fromkeys(range(3), "CUDA0"))))  # fmt: skip
    gpu = speed(1e18, upload=1e18, upload_pageable=1e3)
    hardware = machine(gpus=(GB,), cpu=speed(1e6), gpu=gpu)
    on_cpu = 3 * ATTENTION // 4 + 2 * ROUTED // 4
    seconds = SpeedModel(graph, hardware, on_gpu).decode(99)
    assert seconds == pytest.approx((on_cpu + 100 * CELL) / 1e6)
    # with attn_output on the GPU, the KV cache is copied there for every token
    moved = replace(on_gpu, overrides=(("attn_output", "CUDA0"), *on_gpu.overrides))
    seconds = SpeedModel(graph, hardware, moved).decode(99)
    assert seconds == pytest.approx(2 * ROUTED / 4 / 1e6 + 100 * CELL / 1e3, rel=1e-3)


LAST_EXPERTS = expert_overrides({2: dict.fromkeys(("up", "gate", "down"), "CPU")})
WEIGHTS_ON_GPU = (*gpu_weight_overrides({0: "RPC0", 1: "RPC0"}), *LAST_EXPERTS)
WEIGHTS_IN_RAM = (*ram_weight_overrides(range(2)), *LAST_EXPERTS)


@pytest.mark.parametrize(
    ("layers", "overrides", "splits"),
    [(2, WEIGHTS_ON_GPU, 16), (4, WEIGHTS_IN_RAM, 20), (4, (("_exps", "CPU"),), 6)],
)
def test_splits_are_llama_cpps(
    graph: ModelGraph, layers: int, overrides: tuple[tuple[str, str], ...], splits: int
) -> None:
    """What GGML_SCHED_DEBUG=2 shows of a model of these layers on a worker."""
    placement = replace(CPU_ONLY, layers={"RPC0": layers}, overrides=overrides)
    counting = speed(1e18, split=1, upload=1e18, upload_pageable=1e18)
    hardware = machine(workers=(GB,), cpu=counting, worker=counting)
    assert SpeedModel(graph, hardware, placement).decode(0) == pytest.approx(splits)


def test_nodes_are_llama_cpps(graph: ModelGraph) -> None:
    """llama.cpp counts 107 without views; 3 take rows of the embedding and of the last layer."""
    nodes = machine(cpu=speed(1e18, node=1))
    assert SpeedModel(graph, nodes, CPU_ONLY).decode(0) == pytest.approx(107 - 3)


def test_tells_if_a_machine_is_not_measured() -> None:
    assert not is_measured(machine(), [])
    assert is_measured(machine(cpu=speed(1)), [])
    assert not is_measured(machine(gpus=(GB,), cpu=speed(1)), ["CUDA0"])


def test_another_architecture_and_missing_tensors_are_named(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "other.gguf", architecture="llama")
    with pytest.raises(GGUFError, match="architecture 'llama'"):
        ModelGraph.read(GGUFFile.open(path))
    path = write_random_gguf(tmp_path / "less.gguf", without=["blk.1.attn_q.weight"])
    with pytest.raises(GGUFError, match=r"no tensor blk\.1\.attn_q\.weight"):
        ModelGraph.read(GGUFFile.open(path))


assert CONFIG.vocab_size * CONFIG.hidden_size * 4 == HEAD
