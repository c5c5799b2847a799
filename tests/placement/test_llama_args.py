"""Command lines against ones written by hand after llama.cpp's common/arg.cpp."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dots1_local.placement.llama_args import (
    command_line,
    expert_overrides,
    gpu_weight_overrides,
    layer_pattern,
    llama_flags,
)
from dots1_local.placement.placement import Placement
from tests.placement.machines import GB, machine

CPU_ONLY = Placement(
    model="model.gguf",
    model_bytes=1,
    blocks=62,
    context=16384,
    kv_type="Q8_0",
    flash_attention=True,
    ubatch=2048,
    threads=8,
    host_memory="repacked",
)


def test_cpu_only() -> None:
    assert " ".join(llama_flags(CPU_ONLY, machine())) == (
        "-dev none -ngl 0 -c 16384 -b 2048 -ub 2048 -ctk q8_0 -ctv q8_0 -fa on -t 8 "
        "-lm none --no-host -fit off"
    )


def test_sequences_share_the_context_of_all() -> None:
    flags = " ".join(llama_flags(replace(CPU_ONLY, sequences=4), machine()))
    assert "-c 65536 -b 2048 -ub 2048 -np 4 -kvu -ctk q8_0" in flags


def test_two_gpus() -> None:
    placement = replace(
        CPU_ONLY,
        layers={"CUDA0": 13, "CUDA1": 50},
        overrides=((r"blk\.6[01]\.ffn_.*_exps", "CPU"), (r"blk\.9\.ffn_up_exps", "CUDA1")),
        host_memory="pinned",
        offload_min_batch=64,
        flash_attention=False,
        kv_type="F16",
    )
    assert command_line(placement, machine(gpus=(24 * GB, 24 * GB)), "a model.gguf") == (
        "GGML_OP_OFFLOAD_MIN_BATCH=64 llama-server -m 'a model.gguf' -dev CUDA0,CUDA1 -ngl 63 "
        r"-ts 13,50 -ot 'blk\.6[01]\.ffn_.*_exps=CPU,blk\.9\.ffn_up_exps=CUDA1' "
        "-c 16384 -b 2048 -ub 2048 -ctk f16 -ctv f16 -fa off -t 8 -lm none -fit off"
    )


def test_buffers_of_workers_are_named_by_worker() -> None:
    placement = replace(
        CPU_ONLY,
        layers={"RPC0": 0, "RPC1": 10},
        overrides=(("_exps", "RPC1"),),
        host_memory="mapped",
        workers=("10.0.0.1:50052", "10.0.0.2:50052"),
    )
    flags = llama_flags(placement, machine(workers=(GB, GB)))
    assert flags[:10] == [
        "--rpc", "10.0.0.1:50052,10.0.0.2:50052", "-dev", "RPC0,RPC1", "-ngl", "10",
        "-ts", "0,10", "-ot", "_exps=RPC0[10.0.0.2:50052]",
    ]  # fmt: skip
    assert flags[-5:] == ["-lm", "mmap", "--no-repack", "-fit", "off"]


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [
        ([7], "7"),
        ([61], "61"),
        ([3, 4], "([34])"),
        (range(62), "([0-9]|[1-5][0-9]|6[01])"),
        (range(23, 62), "(2[3-9]|[3-5][0-9]|6[01])"),
        ([5, 15, 25, 40, 125], "(5|[12]5|40|125)"),
        ([1, 3, 4, 5, 8, 9], "([13-589])"),
    ],
)
def test_patterns_are_short(layers: list[int], pattern: str) -> None:
    assert layer_pattern(layers) == pattern


@given(st.sets(st.integers(0, 511), min_size=1))
def test_patterns_match_their_layers_alone(layers: set[int]) -> None:
    pattern = re.compile(rf"blk\.{layer_pattern(layers)}\.")
    matched = {layer for layer in range(520) if pattern.search(f"blk.{layer}.attn_q.weight")}
    assert matched == layers
    assert not set(pattern.pattern) & set(",=")  # at which llama.cpp divides -ot


def test_overrides_of_experts_name_parts() -> None:
    placed = {
        1: {"up": "CPU", "gate": "CPU", "down": "CPU"},
        2: {"up": "CPU", "gate": "CPU", "down": "CPU"},
        3: {"up": "CUDA1", "down": "CPU"},
    }
    assert expert_overrides(placed) == [
        (r"blk\.([12])\.ffn_.*_exps", "CPU"),
        (r"blk\.3\.ffn_up_exps", "CUDA1"),
        (r"blk\.3\.ffn_down_exps", "CPU"),
    ]


def test_norms_and_attn_output_stay_with_a_kv_cache_in_ram() -> None:
    [(pattern, device)] = gpu_weight_overrides({0: "CUDA0", 1: "CUDA0"})
    parts = [
        "attn_norm", "attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm", "attn_output",
        "ffn_norm", "ffn_gate_inp", "ffn_up_exps", "ffn_down_shexp", "ffn_gate",
    ]  # fmt: skip
    moved = [part for part in parts if re.search(pattern, f"blk.1.{part}.weight")]
    assert moved == ["attn_q", "attn_k", "attn_v", "ffn_gate_inp", "ffn_down_shexp", "ffn_gate"]
    assert re.search(pattern, "blk.0.exp_probs_b.bias")
    assert not re.search(pattern, "blk.10.attn_q.weight")
    assert device == "CUDA0"
