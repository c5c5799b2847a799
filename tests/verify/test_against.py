from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.torch import load_file

from dots1_local.convert import convert_checkpoint
from dots1_local.verify import Report, TensorCheck, verify_gguf
from tests.micro import micro_checkpoint
from tests.quant.stock_llama import stock_quantise
from tests.verify.patch import Data, rewrite

DOWN = "blk.2.ffn_down_exps.weight"
Q4_K_M = 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M


@cache
def published(folder: Path) -> dict[str, NDArray[np.float32]]:
    """A checkpoint as safetensors and torch read it."""
    shards = (load_file(shard) for shard in folder.glob("*.safetensors"))
    return {name: value.float().numpy() for shard in shards for name, value in shard.items()}


def stored(path: Path, name: str) -> NDArray[np.float32]:
    """A tensor as gguf-py's own numpy code decodes it."""
    tensor = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == name)
    shape = [int(size) for size in tensor.shape][::-1]
    weights: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    return weights.reshape(shape)


def distance(found: Data, right: Data) -> float:
    difference = found.astype(np.float64) - right
    return sqrt((difference**2).sum() / (right.astype(np.float64) ** 2).sum())


def check_of(report: Report, name: str) -> TensorCheck:
    return next(tensor for tensor in report.tensors if tensor.name == name)


def experts(folder: Path, layer: int, part: str, count: int) -> Data:
    prefix = f"model.layers.{layer}.mlp.experts"
    tensors = published(folder)
    return np.stack([tensors[f"{prefix}.{e}.{part}_proj.weight"] for e in range(count)])


def test_errors_are_those_an_independent_decoder_finds(tiny: Path, converted: Any) -> None:
    path = converted("DQ4")
    report = verify_gguf(path, tiny)
    assert report.findings == ()
    for name, source in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("blk.3.attn_k.weight", "model.layers.3.self_attn.k_proj.weight"),
    ):
        right = published(tiny)[source]
        assert check_of(report, name).error == pytest.approx(distance(stored(path, name), right))
    for part in ("gate", "down"):
        name = f"blk.2.ffn_{part}_exps.weight"
        found, right = stored(path, name), experts(tiny, 2, part, 24)
        each = [distance(found[index], right[index]) for index in range(24)]
        check = check_of(report, name)
        assert check.error == pytest.approx(distance(found, right))
        assert check.worst_error == pytest.approx(max(each))
        assert check.worst_expert == int(np.argmax(each))
    assert report.worst(3) == sorted(report.tensors, key=lambda t: -(t.error or 0))[:3]


@pytest.mark.parametrize("recipe", ["F32", "BF16"])
def test_what_a_type_holds_exactly_is_exact(tiny: Path, converted: Any, recipe: str) -> None:
    report = verify_gguf(converted(recipe), tiny)
    assert report.findings == ()
    assert {tensor.error for tensor in report.tensors} == {0.0}


def test_padding_is_cut_off(tmp_path: Path) -> None:
    source = micro_checkpoint(tmp_path / "hf", hidden_size=256, moe_intermediate_size=192)
    path = tmp_path / "padded.gguf"
    convert_checkpoint(source, path, "Q4_K_M", padding="on")
    report = verify_gguf(path, source)
    assert report.findings == ()
    name = "blk.1.ffn_down_exps.weight"
    assert check_of(report, name).shape == (4, 256, 256)
    found, right = stored(path, name)[:, :, :192], experts(source, 1, "down", 4)
    assert check_of(report, name).error == pytest.approx(distance(found, right))

    def spoil(data: Data) -> Data:
        data[2, 200] = data[2, 10]
        return data

    name = "blk.1.ffn_gate_exps.weight"
    spoilt = rewrite(path, tmp_path / "spoilt.gguf", edit={name: spoil})
    (finding,) = verify_gguf(spoilt, source).findings
    assert f"padding of {name}" in finding.message


def test_a_stock_file_compares_as_well(tiny: Path, converted: Any, tmp_path: Path) -> None:
    path = tmp_path / "stock.gguf"
    stock_quantise(converted("BF16"), path, Q4_K_M)
    report = verify_gguf(path, tiny)
    assert report.findings == ()
    error = check_of(report, "blk.1.ffn_gate_exps.weight").error
    assert error == pytest.approx(
        distance(stored(path, "blk.1.ffn_gate_exps.weight"), experts(tiny, 1, "gate", 24))
    )


def swapped(data: Data) -> Data:
    data[[3, 7]] = data[[7, 3]]
    return data


def test_two_experts_swapped_are_found(tiny: Path, converted: Any, tmp_path: Path) -> None:
    path = rewrite(converted("DQ4"), tmp_path / "swapped.gguf", edit={DOWN: swapped})
    report = verify_gguf(path, tiny)
    (finding,) = report.findings
    assert finding.severity == "error"
    assert finding.message.startswith(f"{DOWN} hold other weights")
    check = check_of(report, DOWN)
    # Two of 24 unrelated experts of like norms: √2 each, √(2 · 2 / 24) over all.
    assert check.worst_expert in (3, 7)
    assert check.worst_error == pytest.approx(sqrt(2), rel=0.1)
    assert check.error == pytest.approx(sqrt(4 / 24), rel=0.1)


def test_one_changed_norm_weight_is_found(tiny: Path, converted: Any, tmp_path: Path) -> None:
    def nudge(data: Data) -> Data:
        data[5] *= np.float32(1 + 2**-20)
        return data

    name = "blk.3.attn_norm.weight"
    path = rewrite(converted("DQ4"), tmp_path / "nudged.gguf", edit={name: nudge})
    (finding,) = verify_gguf(path, tiny).findings
    assert f"{name} in 1 weights that F32 holds exactly" in finding.message


def test_a_coarser_copy_is_noted(tiny: Path, converted: Any, tmp_path: Path) -> None:
    def coarser(data: Data) -> Data:
        data.reshape(-1, 34)[:, 2:] &= 0xF0  # Q8_0 with the upper 4 bits alone
        return data

    name = "blk.1.attn_v.weight"
    path = rewrite(converted("DQ4"), tmp_path / "coarse.gguf", edit={name: coarser})
    report = verify_gguf(path, tiny)
    assert report.ok
    assert [finding.severity for finding in report.findings] == ["note"]
    assert f"{name} lost more" in report.findings[0].message


def test_another_checkpoint_of_the_same_shape_is_found(tmp_path: Path) -> None:
    mine, other = (micro_checkpoint(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    convert_checkpoint(mine, tmp_path / "mine.gguf", "Q8_0")
    assert verify_gguf(tmp_path / "mine.gguf", mine).ok
    messages = [f.message for f in verify_gguf(tmp_path / "mine.gguf", other).findings]
    assert any("hold other weights than the checkpoint" in message for message in messages)
