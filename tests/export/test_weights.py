"""Every exported weight is what gguf-py decodes, rounded as torch rounds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dots1_local.architecture import Dots1Config, inventory
from dots1_local.convert import convert_checkpoint
from dots1_local.export import Export, export_checkpoint
from tests.conftest import Converted
from tests.helpers import CONFIG, random_tensors, write_random_gguf
from tests.micro import micro_checkpoint
from tests.quant.stock_llama import stock_quantise
from tests.verify.patch import Data, rewrite, tensor_bytes

ALL_F32, IQ3_S = 0, 26  # LLAMA_FTYPE_ALL_F32, LLAMA_FTYPE_MOSTLY_IQ3_S
INDEX = "model.safetensors.index.json"


def exported(folder: Path) -> dict[str, Tensor]:
    """A checkpoint as safetensors and torch read it."""
    shards = [load_file(shard) for shard in sorted(folder.glob("*.safetensors"))]
    return {name: value for shard in shards for name, value in shard.items()}


def decoded(*paths: Path) -> dict[str, Tensor]:
    """The tensors of a file by GGUF name, as gguf-py's own numpy code decodes them."""
    return {
        tensor.name: torch.from_numpy(
            dequantize(np.array(tensor.data), GGMLQuantizationType(tensor.tensor_type)).reshape(
                [int(size) for size in tensor.shape][::-1]
            )
        )
        for path in paths
        for tensor in GGUFReader(path).tensors
    }


def expected(config: Dots1Config, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a checkpoint of `config` should hold, without padding."""
    found = {}
    for spec in inventory(config):
        whole = stored[spec.name]
        parts = whole if len(spec.sources) > 1 else [whole]
        for source, part in zip(spec.sources, parts, strict=True):
            cut = part[tuple(slice(size) for size in spec.source_shape)]
            found[source] = cut if "e_score" in source else cut.bfloat16()
    return found


def assert_equal(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("DQ2", {}),
        ("DQ2", {"padding": "on", "imatrix": "imatrix.gguf"}),
        ("DQ4", {}),
        ("Q4_K_M", {"padding": "on"}),
        ("Q5_1", {}),
        ("F16", {}),
        ("F32", {}),
    ],
)
def test_weights_are_what_an_independent_decoder_finds(
    tiny: Path, converted: Converted, tmp_path: Path, recipe: str, options: dict[str, Any]
) -> None:
    if "imatrix" in options:
        options = options | {"imatrix": tiny / options["imatrix"]}
    path = converted(recipe, **options)
    export_checkpoint(path, tmp_path / "out", shard_size=10_000_000)
    config = Dots1Config.from_json(json.loads((tiny / "config.json").read_text()))
    assert_equal(exported(tmp_path / "out"), expected(config, decoded(path)))


def test_a_stock_file(tiny: Path, converted: Converted, tmp_path: Path) -> None:
    path = tmp_path / "stock.gguf"
    stock_quantise(converted("BF16"), path, IQ3_S)
    export_checkpoint(path, tmp_path / "out")
    config = Dots1Config.from_json(json.loads((tiny / "config.json").read_text()))
    assert_equal(exported(tmp_path / "out"), expected(config, decoded(path)))


def test_types_of_few_values_and_nvfp4(tiny: Path, converted: Converted, tmp_path: Path) -> None:
    types = ["down_exps=q2_0", "gate_exps=tq1_0", "up_exps=nvfp4", "attn_q=tq2_0", "attn_k=q1_0"]
    path = tmp_path / "few.gguf"
    convert_checkpoint(tiny, path, "Q4_0", overrides=types)
    stock_quantise(path, tmp_path / "f32.gguf", ALL_F32)
    export_checkpoint(path, tmp_path / "out")
    config = Dots1Config.from_json(json.loads((tiny / "config.json").read_text()))
    assert_equal(exported(tmp_path / "out"), expected(config, decoded(tmp_path / "f32.gguf")))


def test_a_bf16_file_gives_the_checkpoint_back(
    tiny: Path, converted: Converted, tmp_path: Path
) -> None:
    export_checkpoint(converted("BF16"), tmp_path / "out")
    assert_equal(exported(tmp_path / "out"), exported(tiny))
    index, published = (json.loads((f / INDEX).read_text()) for f in (tmp_path / "out", tiny))
    assert index["metadata"] == published["metadata"]
    assert index["weight_map"].keys() == published["weight_map"].keys()


@pytest.mark.parametrize("recipe", ["BF16", "F32"])
def test_converting_again_gives_the_same_tensors(
    converted: Converted, tmp_path: Path, recipe: str
) -> None:
    export_checkpoint(converted(recipe), tmp_path / "out")
    convert_checkpoint(tmp_path / "out", tmp_path / "again.gguf", recipe)
    assert tensor_bytes(tmp_path / "again.gguf") == tensor_bytes(converted(recipe))


def test_a_split_file_and_any_shard_of_it(tiny: Path, converted: Converted, tmp_path: Path) -> None:
    result = convert_checkpoint(tiny, tmp_path / "s.gguf", "DQ4", split_max_size=3_000_000)
    assert len(result.paths) > 2
    export_checkpoint(result.paths[1], tmp_path / "split")
    export_checkpoint(converted("DQ4"), tmp_path / "whole")
    assert_equal(exported(tmp_path / "split"), exported(tmp_path / "whole"))


def test_fused_attention_comes_apart(tmp_path: Path) -> None:
    tensors = random_tensors()
    fused = {
        f"blk.{layer}.attn_qkv.weight": np.concatenate(
            [tensors[f"blk.{layer}.attn_{letter}.weight"] for letter in "qkv"]
        )
        for layer in range(CONFIG.num_hidden_layers)
    }
    apart = [f"blk.{layer}.attn_{x}.weight" for layer in range(3) for x in "qkv"]
    write_random_gguf(tmp_path / "fused.gguf", tensors=fused, without=apart)
    write_random_gguf(tmp_path / "apart.gguf")
    for name in ("fused", "apart"):
        export_checkpoint(tmp_path / f"{name}.gguf", tmp_path / name)
    assert_equal(exported(tmp_path / "fused"), exported(tmp_path / "apart"))


def test_shards_hold_what_they_may_in_the_published_order(
    converted: Converted, tmp_path: Path
) -> None:
    limit = 700_000
    result = export_checkpoint(converted("Q8_0"), tmp_path / "out", shard_size=limit)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(shards)
    assert [s.name for s in shards] == [
        f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)
    ]
    order: list[str] = []
    for shard in shards:
        with safe_open(shard, "pt") as file:
            names = list(file.offset_keys())
            assert file.metadata() == {"format": "pt"}
            sizes = [file.get_tensor(name).nbytes for name in names]
        assert sum(sizes) <= limit or len(sizes) == 1
        assert all(index["weight_map"][name] == shard.name for name in names)
        order += [name for name in names if "e_score" not in name]
    experts = [name for name in order if ".layers.1.mlp.experts." in name]
    assert experts == [
        f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
        for expert in range(24)
        for part in ("gate", "up", "down")
    ]
    layers = [int(name.split(".")[2]) for name in order if ".layers." in name]
    assert layers == sorted(layers)
    assert order[0] == "model.embed_tokens.weight"
    assert order[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert result.nbytes == sum(file.stat().st_size for file in result.files)


@pytest.mark.parametrize("shift", [0, 1])
def test_padding_is_cut_where_all_experts_have_it(tmp_path: Path, shift: int) -> None:
    """One weight anywhere in the padding makes a unit that must be kept."""
    source = micro_checkpoint(tmp_path / "hf", hidden_size=256, moe_intermediate_size=192)
    path = tmp_path / "padded.gguf"
    convert_checkpoint(source, path, "F32", padding="on")

    def fill(data: Data) -> Data:
        data[3, 192 + shift, 7] = 1e-30
        return data

    filled = rewrite(path, tmp_path / "f.gguf", edit={"blk.1.ffn_up_exps.weight": fill})
    cut, kept = Export.prepare(path), Export.prepare(filled)
    assert (cut.config.moe_intermediate_size, cut.stored_width) == (192, 256)
    assert (kept.config.moe_intermediate_size, kept.stored_width) == (193 + shift, 256)

    def share(data: Data) -> Data:
        data[2 * 192 + shift, 7] = 1e-30
        return data

    filled = rewrite(path, tmp_path / "s.gguf", edit={"blk.1.ffn_gate_shexp.weight": share})
    assert Export.prepare(filled).config.moe_intermediate_size == 193


def test_experts_of_zeros_stay(tmp_path: Path) -> None:
    zeros = {
        spec.name: np.zeros(spec.shape, np.float32)
        for spec in inventory(CONFIG)
        if spec.role in ("routed", "shared")
    }
    export = Export.prepare(write_random_gguf(tmp_path / "m.gguf", tensors=zeros))
    assert export.config.moe_intermediate_size == CONFIG.moe_intermediate_size
