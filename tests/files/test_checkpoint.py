import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dots1_local.architecture import inventory
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint
from tests.micro import edit_header, edit_json, micro_checkpoint

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_checkpoint(tmp_path_factory.mktemp("pristine"), shards=3)


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy in three shards, for tests to break."""
    return shutil.copytree(pristine, tmp_path / "broken")


def open_and_check(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(folder)
    checkpoint.check(inventory(checkpoint.config))
    return checkpoint


def refusal(folder: Path) -> str:
    """The one sentence with which reading the checkpoint fails."""
    with pytest.raises(CheckpointError) as error:
        open_and_check(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def shard_of(folder: Path, tensor: str) -> Path:
    name: str = json.loads((folder / INDEX).read_text())["weight_map"][tensor]
    return folder / name


def test_reads_what_safetensors_wrote_exactly(folder: Path) -> None:
    rng = np.random.default_rng(0)
    values = np.array([0.0, -0.0, 1.0, -3.0, 65504.0, 2.0**-24, np.inf], np.float16)
    half, single = values.reshape(7, 1), rng.standard_normal((3, 5), np.float32)
    save_file({"half": half, "single": single}, folder / "model.safetensors")
    (folder / INDEX).unlink()
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint) == {"half", "single"}
    assert checkpoint.read("half").dtype == np.float32
    np.testing.assert_array_equal(checkpoint.read("half"), half.astype(np.float32))
    np.testing.assert_array_equal(checkpoint.read("single"), single)


def test_bfloat16_bits(folder: Path) -> None:
    path = folder / "model.safetensors"
    # 1, -3, the smallest subnormal, the largest finite, -0: by IEEE 754's upper half.
    save_file({"x": np.array([0x3F80, 0xC040, 0x0001, 0x7F7F, 0x8000], np.uint16)}, path)
    edit_header(path, lambda header: header["x"].update(dtype="BF16"))
    (folder / INDEX).unlink()
    values = Checkpoint.open(folder).read("x")
    expected = np.array([1, -3, 2.0**-133, (2 - 2.0**-7) * 2.0**127, -0.0], np.float32)
    np.testing.assert_array_equal(values, expected)
    assert np.signbit(values[4])


def test_transformers_packed_experts_read_as_the_published_ones(tmp_path: Path) -> None:
    """What transformers saves by expert, and its own packed weights, give the same values."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file as save_torch

    torch.manual_seed(0)
    config = transformers.Dots1Config(
        vocab_size=64, hidden_size=48, intermediate_size=40, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, n_shared_experts=2,
        n_routed_experts=3, num_experts_per_tok=2, first_k_dense_replace=1,
        rope_parameters={"rope_theta": 1e7, "rope_type": "default"}, sliding_window=None,
    )  # fmt: skip
    model = transformers.Dots1ForCausalLM(config)
    by_expert, packed = tmp_path / "by_expert", tmp_path / "packed"
    model.save_pretrained(by_expert)
    packed.mkdir()
    shutil.copy(by_expert / "config.json", packed)
    state = model.state_dict()
    assert state["model.layers.1.mlp.experts.gate_up_proj"].shape == (3, 32, 48)
    save_torch(state, packed / "model.safetensors")

    published, unpacked = open_and_check(by_expert), open_and_check(packed)
    assert published.config.rope_theta == 1e7
    for spec in inventory(published.config):
        for source in spec.sources:
            np.testing.assert_array_equal(published.read(source), unpacked.read(source))


def test_packed_experts_of_another_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    name = "model.layers.1.mlp.experts.gate_up_proj"
    save_file({name: np.zeros((4, 64, 32), np.float32)}, path)
    (folder / INDEX).unlink()
    message = refusal(folder)
    assert f"{name} in {path.name}" in message
    assert "[4, 64, 32]" in message
    assert "[4, 64, 64]" in message


def test_no_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "no such folder" in refusal(tmp_path / "file")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json is missing" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "\x00", "[" * 100_000, '{"a": NaN}x'])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_broken_json(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert name in refusal(folder)


def test_config_is_not_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x80")
    assert "config.json is not readable JSON" in refusal(folder)


def test_a_name_in_the_config_is_half_a_surrogate_pair(folder: Path) -> None:
    edit_json(folder / "config.json", lambda raw: raw.update({"\ud800": 1}))
    assert "config.json is not readable JSON" in refusal(folder)


def test_another_architecture_is_reported_before_missing_shards(folder: Path) -> None:
    edit_json(folder / "config.json", lambda raw: raw.update(architectures=["LlamaForCausalLM"]))
    (folder / SHARD).unlink()
    assert "LlamaForCausalLM" in refusal(folder)


def test_no_weights(folder: Path) -> None:
    (folder / INDEX).unlink()
    assert "neither model.safetensors.index.json nor model.safetensors" in refusal(folder)


def test_missing_shard(folder: Path) -> None:
    (folder / SHARD).unlink()
    assert f"{folder / SHARD} is missing" in refusal(folder)


def test_missing_index_entry(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(EXPERT))
    assert EXPERT in refusal(folder)


def test_index_promises_what_the_shard_lacks(folder: Path) -> None:
    other = "model-00001-of-00003.safetensors"
    wrong = other if shard_of(folder, EXPERT).name != other else SHARD
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({EXPERT: wrong}))
    message = refusal(folder)
    assert EXPERT in message
    assert wrong in message


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_index_without_weight_map(folder: Path, weight_map: object) -> None:
    edit_json(folder / INDEX, lambda index: index.update(weight_map=weight_map))
    assert f"{INDEX} has no weight_map" in refusal(folder)


@pytest.mark.parametrize(
    "shard",
    ["../" + SHARD, "/etc/passwd", "sub/x.safetensors", "..", "", "x\0y", "x" * 5000, 7, {}],
)
def test_index_maps_only_to_files_beside_it(folder: Path, shard: object) -> None:
    (folder.parent / SHARD).write_bytes((folder / SHARD).read_bytes())
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({EXPERT: shard}))
    message = refusal(folder)
    assert "not a file name" in message or "is missing" in message


def test_layers_missing(folder: Path) -> None:
    edit_json(folder / "config.json", lambda raw: raw.update(num_hidden_layers=5))
    message = refusal(folder)
    assert "has no layer 2" in message
    assert "5 layers" in message


def test_more_experts_promised_than_there(folder: Path) -> None:
    edit_json(folder / "config.json", lambda raw: raw.update(n_routed_experts=5))
    assert "model.layers.1.mlp.gate.weight" in refusal(folder)


@pytest.mark.parametrize("left", [0, 5, 8, 200, -1])
def test_truncated_shard(folder: Path, left: int) -> None:
    path = folder / SHARD
    os.truncate(path, left if left >= 0 else path.stat().st_size - 1)
    assert str(path) in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"<html>404 not found</html>",
        b"\xff" * 64,
        (2**63).to_bytes(8, "little") + b"{}",
        (200 << 20).to_bytes(8, "little") + b"{" * 32,
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null",
        (3).to_bytes(8, "little") + b"\xff\xfe\x80",
        (0).to_bytes(8, "little"),
    ],
)
def test_garbage_shard(folder: Path, content: bytes) -> None:
    (folder / SHARD).write_bytes(content)
    assert str(folder / SHARD) in refusal(folder)


def _offsets(start: int, end: int) -> Edit:
    return lambda entry: entry.update(data_offsets=[start, end])


@pytest.mark.parametrize(
    "edit",
    [
        _offsets(-64, 4032),
        _offsets(4096, 0),
        _offsets(0, 64),
        _offsets(10**18, 10**18 + 4096),
        lambda entry: entry.update(data_offsets=[0]),
        lambda entry: entry.update(data_offsets="04"),
        lambda entry: entry.update(data_offsets=[0.0, 4096.0]),
        lambda entry: entry.update(shape=[-32, -64]),
        lambda entry: entry.update(shape=[32, 64, 10**30]),
        lambda entry: entry.update(shape=None),
        lambda entry: entry.update(dtype="I64"),
        lambda entry: entry.update(dtype="F8_E5M2"),
        lambda entry: entry.update(dtype=["BF16"]),
        lambda entry: entry.clear(),
    ],
)
def test_garbled_tensor_entry(folder: Path, edit: Edit) -> None:
    path = shard_of(folder, EXPERT)
    edit_header(path, lambda header: edit(header[EXPERT]))
    message = refusal(folder)
    assert EXPERT in message
    assert path.name in message


def test_an_unsupported_dtype_lists_the_supported_ones(folder: Path) -> None:
    path = shard_of(folder, EXPERT)
    edit_header(path, lambda header: header[EXPERT].update(dtype="F8_E5M2"))
    assert "F8_E5M2" in refusal(folder)
    assert "F32, F16, BF16 and F8_E4M3" in refusal(folder)


def test_overlapping_tensors(folder: Path) -> None:
    path = shard_of(folder, EXPERT)
    sibling = EXPERT.replace("up_proj", "gate_proj")

    def overlap(header: dict[str, Any]) -> None:
        header[EXPERT]["data_offsets"] = [n + 2 for n in header[sibling]["data_offsets"]]

    edit_header(path, overlap)
    message = refusal(folder)
    assert EXPERT in message
    assert sibling in message
    assert path.name in message


def test_wrong_shape(folder: Path) -> None:
    path = shard_of(folder, EXPERT)
    edit_header(path, lambda header: header[EXPERT].update(shape=[64, 32]))
    message = refusal(folder)
    assert f"{EXPERT} in {path.name}" in message
    assert "[64, 32]" in message
    assert "[32, 64]" in message


def test_shard_truncated_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    path = checkpoint.locate(EXPERT).file
    os.truncate(path, 100)
    with pytest.raises(CheckpointError, match="ended early"):
        checkpoint.read(EXPERT)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.read(EXPERT)


def test_unknown_tensor(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert EXPERT in checkpoint
    assert "nothing" not in checkpoint
    with pytest.raises(CheckpointError, match="no tensor nothing"):
        checkpoint.read("nothing")


def test_the_hubs_cache_names_a_model_above_its_commit(tmp_path: Path) -> None:
    """As huggingface_hub lays its cache out; the name goes into GGUF files."""
    repo = tmp_path / "models--rednote-hilab--dots.llm1.inst"
    folder = repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    checkpoint = Checkpoint.open(micro_checkpoint(folder))
    assert checkpoint.name == "dots.llm1.inst"


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_pointer_of_git_lfs_is_called_one(folder: Path, name: str) -> None:
    path = folder / name
    assert path.exists()
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\n"
        "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
        "size 12345\n"
    )
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer.*12\.3 kB"):
        Checkpoint.open(folder)
