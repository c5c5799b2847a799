import json
from pathlib import Path
from typing import Any

import pytest

from dots1_local.errors import UsageError
from dots1_local.placement.placement import Placement, load_placement

PLACEMENT = Placement(
    model="model.gguf",
    model_bytes=1234,
    blocks=4,
    context=4096,
    kv_type="Q8_0",
    flash_attention=True,
    ubatch=512,
    threads=8,
    host_memory="pinned",
    offload_min_batch=64,
    layers={"CUDA0": 1, "RPC0": 2},
    overrides=((r"blk\.[0-2]\.ffn_.*_exps", "CPU"), (r"blk\.0\.(?!attn_output)", "CUDA0")),
    workers=("10.0.0.1:50052",),
    sequences=4,
)


def write(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(PLACEMENT.to_json() | changes))
    return path


def test_reads_what_it_writes(tmp_path: Path) -> None:
    assert load_placement(write(tmp_path / "plan.json")) == PLACEMENT
    assert load_placement(write(tmp_path / "plan.json", predicted={"x": 1})) == PLACEMENT


def test_one_that_says_nothing_of_sequences_is_for_one(tmp_path: Path) -> None:
    content = PLACEMENT.to_json()
    del content["sequences"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    assert load_placement(tmp_path / "plan.json").sequences == 1


def test_layers_are_counted_from_the_end() -> None:
    # 4 blocks and the output are 5 layers, of which 3 are counted.
    assert [PLACEMENT.device_of_layer(layer) for layer in range(5)] == [
        "CPU", "CPU", "CUDA0", "RPC0", "RPC0",
    ]  # fmt: skip
    assert PLACEMENT.gpu_layers == 3
    assert PLACEMENT.devices == ("CUDA0", "RPC0")


@pytest.mark.parametrize(
    ("tensor", "device"),
    [
        ("token_embd.weight", "CPU"),
        ("blk.0.attn_q.weight", "CUDA0"),  # the second pattern
        ("blk.0.attn_output.weight", "CPU"),
        ("blk.0.ffn_up_exps.weight", "CPU"),  # the first of two patterns that match
        ("blk.2.ffn_up_exps.weight", "CPU"),
        ("blk.2.ffn_up_shexp.weight", "CUDA0"),
        ("blk.3.ffn_up_exps.weight", "RPC0"),
        ("output.weight", "RPC0"),
        ("output_norm.weight", "RPC0"),
    ],
)
def test_finds_the_device_of_a_tensor(tensor: str, device: str) -> None:
    assert PLACEMENT.device_of(tensor) == device


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": {"CUDA0": 6}}, "6 layers of the 5 there are"),
        ({"layers": {"CUDA0": -1}}, "not an integer"),
        ({"overrides": [["(", "CPU"]]}, r"has the pattern '\('"),
        ({"overrides": ["x"]}, "as an override"),
        ({"overrides": [["(?P<x>a)", "CPU"]]}, r"std::regex does not know '\(\?'"),
        ({"overrides": [["(?<=blk)a", "CPU"]]}, "std::regex does not know"),
        ({"overrides": [["(?i)a", "CPU"]]}, "std::regex does not know"),
        ({"overrides": [["a++", "CPU"]]}, r"std::regex does not know '\+\+'"),
        ({"overrides": [[r"a\Z", "CPU"]]}, "std::regex does not know"),
        ({"overrides": [["a" * 2049, "CPU"]]}, "of 2,049 characters"),
        ({"flash_attention": False}, "a KV cache in Q8_0 and no flash attention"),
        ({"kv_type": "Q4_K"}, "not one of F32, F16"),
        ({"host_memory": "swapped"}, "not one of plain, pinned"),
        ({"threads": 0}, "not an integer from 1"),
        ({"workers": [1]}, "not HOST:PORT"),
        ({"sequences": 0}, "not an integer from 1"),
        ({"sequences": 257}, "has 1 to 256 sequences at once, not 257"),
        ({"sequences": 200, "context": 1 << 24}, "no context of 200 × 16,777,216 tokens"),
        ({"ubatches": 512}, "unknown key 'ubatches'"),
        ({"format": "dots1-hardware"}, "is no placement"),
        ({"version": 2}, "another version"),
    ],
)
def test_says_what_is_wrong_with_an_edited_one(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        load_placement(write(tmp_path / "plan.json", **changes))
