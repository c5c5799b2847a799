"""Checkpoints in FP8 with scales, as quantised derivatives are published: against torch."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from dots1_local.cli import app
from dots1_local.convert import Conversion
from dots1_local.errors import CheckpointError
from dots1_local.hub import open_hub
from tests.hub_server import NAME, HubServer
from tests.micro import edit_json, micro_checkpoint

Tensors = dict[str, torch.Tensor]
QUERY = "model.layers.0.self_attn.q_proj.weight"
BLOCK = 48  # no divisor of the widths, so that blocks at the edges are cut off


def by_block(weights: torch.Tensor) -> torch.Tensor:
    rows, columns = (-(-length // BLOCK) for length in weights.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weights.shape[0], : weights.shape[1]] = weights
    blocks: torch.Tensor = padded.unflatten(0, (rows, BLOCK)).unflatten(2, (columns, BLOCK))
    return blocks.abs().amax((1, 3)) / 448


def expanded(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if scales.numel() in (1, shape[0]):
        return scales.reshape(-1, 1).expand(shape)
    each = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return each[: shape[0], : shape[1]]


Scaling = Callable[[torch.Tensor], torch.Tensor]
FORMS: dict[str, tuple[str, Scaling, dict[str, Any]]] = {
    "DeepSeek": ("_scale_inv", by_block, {"quant_method": "fp8", "weight_block_size": [48, 48]}),
    "blocks": (
        "_scale", by_block,
        {"config_groups": {"group_0": {"weights": {"block_structure": [BLOCK, BLOCK]}}}},
    ),
    "rows": ("_scale", lambda w: w.abs().amax(1, keepdim=True) / 448, {"config_groups": {}}),
    "matrix": ("_scale", lambda w: w.abs().amax().reshape(1) / 448, {}),
}  # fmt: skip


def quantised(folder: Path, form: str) -> tuple[Path, Tensors]:
    """A checkpoint whose matrices in layers are in FP8, and what they mean."""
    suffix, scaling, settings = FORMS[form]
    path = micro_checkpoint(folder, shards=2, hidden_size=128, moe_intermediate_size=96)
    meant: Tensors = {}
    for shard in sorted(path.glob("*.safetensors")):
        stored: Tensors = {}
        for name, tensor in load_file(shard).items():
            stored[name] = tensor
            if re.search(r"layers\.\d+\..*_proj\.weight", name):
                scales = scaling(tensor.float())
                whole = expanded(scales, tensor.shape)
                stored[name] = (tensor.float() / whole).to(torch.float8_e4m3fn)
                stored[f"{name}{suffix}"] = scales
                meant[name] = stored[name].float() * whole
        save_file(stored, shard)
    write_index(path)
    edit_json(path / "config.json", lambda raw: raw.update(quantization_config=settings))
    return path, meant


def write_index(path: Path) -> None:
    names = {name: shard.name for shard in path.glob("*.safetensors") for name in load_file(shard)}
    index = path / "model.safetensors.index.json"
    edit_json(index, lambda raw: raw.update(weight_map=names))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_multiplied_by_their_scales(tmp_path: Path, form: str) -> None:
    path, meant = quantised(tmp_path / "hf", form)
    assert run("convert", path, "-o", tmp_path / "out.gguf", "--type", "F32").exit_code == 0
    found = {t.name: np.array(t.data) for t in GGUFReader(tmp_path / "out.gguf").tensors}
    np.testing.assert_array_equal(found["blk.0.attn_q.weight"], meant[QUERY].numpy())
    experts = [meant[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(4)]
    np.testing.assert_array_equal(found["blk.1.ffn_down_exps.weight"], torch.stack(experts).numpy())
    verified = run("verify", tmp_path / "out.gguf", "--against", path)
    assert verified.exit_code == 0, verified.stdout


def test_calibration_reads_them(tmp_path: Path) -> None:
    path, _ = quantised(tmp_path / "hf", "DeepSeek")
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a small model. " * 20)
    result = run("calibrate", path, "-f", text, "-o", tmp_path / "out", "-c", 32, "-t", 1)
    assert result.exit_code == 0


@pytest.mark.usefixtures("cache")
def test_scales_in_another_shard_are_fetched_and_kept_as_long_as_needed(tmp_path: Path) -> None:
    path, meant = quantised(tmp_path / "hf", "DeepSeek")
    shards = sorted(path.glob("*.safetensors"))
    held = [load_file(shard) for shard in shards]
    moved = {name: each.pop(name) for each in held for name in list(each) if "scale" in name}
    for shard, tensors in zip(shards, (held[0] | moved, held[1]), strict=True):
        save_file(tensors, shard)
    write_index(path)
    with HubServer(path) as server:
        Conversion.prepare(open_hub(NAME, endpoint=server.endpoint), "F32").run(
            tmp_path / "out.gguf", low_disk=True
        )
        huggingface_hub.close_session()
    found = {t.name: np.array(t.data) for t in GGUFReader(tmp_path / "out.gguf").tensors}
    last = meant["model.layers.1.mlp.shared_experts.down_proj.weight"]
    np.testing.assert_array_equal(found["blk.1.ffn_down_shexp.weight"], last.numpy())


def without_scales(tensors: Tensors) -> None:
    del tensors[f"{QUERY}_scale_inv"]


def with_wrong_scales(tensors: Tensors) -> None:
    tensors[f"{QUERY}_scale_inv"] = torch.ones(7, 7)


@pytest.mark.parametrize("change", [without_scales, with_wrong_scales])
def test_missing_and_wrong_scales_are_named(
    tmp_path: Path, change: Callable[[Tensors], None]
) -> None:
    path, _ = quantised(tmp_path / "hf", "DeepSeek")
    (shard,) = (s for s in path.glob("*.safetensors") if QUERY in load_file(s))
    stored = load_file(shard)
    change(stored)
    save_file(stored, shard)
    write_index(path)
    result = run("convert", path, "--dry-run")
    assert isinstance(result.exception, CheckpointError)
    assert QUERY in str(result.exception)
