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


def test_sequences_default_to_one(tmp_path: Path) -> None:
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
    assert PLACEMENT.used_devices == ("CUDA0", "RPC0")


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
    ("changes", "words"),
    [
        ({"layers": {"CUDA0": 6}}, ["layers: ", "6 layers", "has 5"]),
        ({"layers": {"CUDA0": -1}}, ["layers", ">= 0"]),
        ({"overrides": [["(", "CPU"]]}, ["overrides[0]: ", "'('"]),
        ({"overrides": ["x"]}, ["overrides[0]: ", "str"]),
        ({"overrides": [["a", "CPU"], ["b"]]}, ["overrides[1]: ", "length 2"]),
        ({"overrides": [["(?P<x>a)", "CPU"]]}, ["overrides[0]: ", "std::regex", "'(?'"]),
        ({"overrides": [["(?<=blk)a", "CPU"]]}, ["overrides[0]: ", "std::regex"]),
        ({"overrides": [["(?i)a", "CPU"]]}, ["overrides[0]: ", "std::regex"]),
        ({"overrides": [["a++", "CPU"]]}, ["overrides[0]: ", "std::regex", "'++'"]),
        ({"overrides": [[r"a\Z", "CPU"]]}, ["overrides[0]: ", "std::regex"]),
        ({"overrides": [["a" * 2049, "CPU"]]}, ["overrides[0]: ", "2,049 characters"]),
        ({"flash_attention": False}, ["kv_type: ", "Q8_0", "flash attention"]),
        ({"flash_attention": 0}, ["flash_attention: ", "bool"]),
        ({"kv_type": "Q4_K"}, ["kv_type: ", "'Q4_K'", "F32, F16"]),
        ({"host_memory": "swapped"}, ["host_memory: ", "'swapped'"]),
        ({"threads": 0}, ["threads: ", ">= 1"]),
        ({"threads": "8"}, ["threads: ", "expected int, got str"]),
        ({"workers": [1]}, ["workers[0]: ", "str"]),
        ({"sequences": 0}, ["sequences: ", ">= 1"]),
        ({"sequences": 257}, ["1 to 256 sequences", "257"]),
        ({"sequences": 200, "context": 1 << 24}, ["200 × 16,777,216 tokens"]),
        ({"ubatches": 512}, ["ubatches: ", "unknown"]),
        ({"model": "a\nb"}, ["model: "]),
        ({"format": "dots1-hardware"}, ["'dots1-hardware'", "dots1 plan"]),
        ({"version": 2}, ["another version"]),
    ],
)
def test_an_error_in_an_edited_plan_is_named(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    path = write(tmp_path / "plan.json", **changes)
    with pytest.raises(UsageError) as error:
        load_placement(path)
    if "sequences" not in changes:
        assert str(path) in str(error.value)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "key", ["format", "version", "model", "model_bytes", "blocks", "context", "kv_type", "ubatch"]
)
def test_names_a_missing_field(tmp_path: Path, key: str) -> None:
    content = PLACEMENT.to_json()
    del content[key]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=rf"plan\.json.*{key}"):
        load_placement(tmp_path / "plan.json")


def test_a_plan_of_convert_is_called_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "quantisation.json"
    path.write_text(
        json.dumps({"recipe": "DQ4", "expert_width": 1536, "file_type": 1, "types": {}})
    )
    with pytest.raises(UsageError, match=r"dots1 plan --json.*quantisation plan.*dots1 convert"):
        load_placement(path)


@pytest.mark.parametrize("text", ["[]", "1", "{}", '{"format": null}', "{", '{"a": 1, "a": 2}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UsageError, match=r"plan\.json is not a plan"):
        load_placement(tmp_path / "plan.json")


@pytest.mark.parametrize("key", ["layers", "overrides", "workers", "context"])
def test_a_key_that_was_deleted_is_missed(tmp_path: Path, key: str) -> None:
    content = PLACEMENT.to_json()
    del content[key]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=f"plan.json.*{key}"):
        load_placement(path)
