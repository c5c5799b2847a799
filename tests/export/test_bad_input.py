"""Files from anywhere: a file that cannot be exported exactly is refused."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from transformers import AutoConfig
from typer.testing import CliRunner

from dots1_local.cli import app
from dots1_local.errors import Dots1Error, GGUFError
from dots1_local.export import Export, export_checkpoint
from tests.conftest import Converted
from tests.helpers import CONFIG, random_tensors, write_random_gguf
from tests.verify.patch import Data, rewrite

FLOAT, STRING = GGUFValueType.FLOAT32, GGUFValueType.STRING


def damage(name: str, value: float) -> dict[str, Any]:
    """A tensor with `value` as one weight."""
    tensor = random_tensors()[name]
    tensor.reshape(-1)[7] = value
    return {name: tensor}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("blk.2.ffn_down_exps.weight", np.nan, "NaN or infinite"),
        ("blk.0.attn_q.weight", -np.inf, "NaN or infinite"),
        ("blk.1.exp_probs_b.bias", np.nan, "NaN or infinite"),
        ("output.weight", 3.4e38, "beyond the range of BF16"),
        ("blk.1.ffn_gate_shexp.weight", -3.4e38, "beyond the range of BF16"),
    ],
)
def test_weights_that_are_not_finite_or_too_large(
    tmp_path: Path, name: str, value: float, says: str
) -> None:
    path = write_random_gguf(tmp_path / "m.gguf", tensors=damage(name, value))
    result = CliRunner().invoke(app, ["export", str(path), "-o", str(tmp_path / "out")])
    assert isinstance(result.exception, GGUFError)
    assert str(result.exception).startswith(f"{name} of {path} (")
    assert says in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_the_largest_weight_that_fits_is_rounded(tmp_path: Path) -> None:
    tensors = damage("output.weight", 3.3895e38)  # BF16's largest, and a little more
    export_checkpoint(write_random_gguf(tmp_path / "m.gguf", tensors=tensors), tmp_path / "out")


def test_a_block_with_an_infinite_scale(converted: Converted, tmp_path: Path) -> None:
    def spoil(data: Data) -> Data:
        data.reshape(-1, 34)[1000, :2] = (0x00, 0x7C)  # of Q8_0
        return data

    name = "blk.1.attn_k.weight"
    path = rewrite(converted("DQ4"), tmp_path / "spoilt.gguf", edit={name: spoil})
    with pytest.raises(GGUFError, match=rf"^{name} of .*self_attn\.k_proj\.weight\) has NaN"):
        export_checkpoint(path, tmp_path / "out")


def test_a_file_cut_before_and_after_its_header_is_read(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "m.gguf")
    export = Export.prepare(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(GGUFError, match="ended early"):
        export.run(tmp_path / "out")
    with pytest.raises(GGUFError, match="truncated"):
        Export.prepare(path)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"dots1.rope.scaling.factor": (FLOAT, 4.0)}, "scales RoPE"),
        ({"dots1.rope.scaling.type": (STRING, "yarn")}, "scales RoPE"),
        ({"dots1.rope.scale_linear": (FLOAT, 2.0)}, "scales RoPE"),
        ({"dots1.expert_gating_func": (GGUFValueType.UINT32, 1)}, "dots1 verify finds in"),
        ({"dots1.embedding_length": (GGUFValueType.UINT32, 128)}, "dots1 verify finds in"),
    ],
)
def test_keys_that_compute_something_else(
    tmp_path: Path, values: Mapping[str, tuple[GGUFValueType, Any]], says: str
) -> None:
    path = write_random_gguf(tmp_path / "m.gguf")
    keys = {name: value for name, (_, value) in values.items()}
    types = {name: kind for name, (kind, _) in values.items()}
    with pytest.raises(GGUFError, match=says):
        Export.prepare(rewrite(path, tmp_path / "other.gguf", keys, types=types))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"without": ["blk.1.exp_probs_b.bias"]}, "chooses experts without it"),
        ({"without": ["output.weight"]}, "lacks output.weight"),
        ({"tensors": {"blk.1.ffn_up_exps.scale": np.ones(8, np.float32)}}, "does not multiply"),
        ({"tensors": {"blk.1.attn_v.scale": np.ones(1, np.float32)}}, "no place"),
        ({"tensors": {"blk.1.attn_q.bias": np.ones(64, np.float32)}}, "not part of a dots1"),
    ],
)
def test_files_that_are_not_dots1_models(
    tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(GGUFError, match=says):
        Export.prepare(write_random_gguf(tmp_path / "m.gguf", **options))


def test_a_type_that_is_not_decoded_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = GGUFWriter.add_tensor

    def as_integers(writer: GGUFWriter, name: str, data: Data) -> None:
        add(writer, name, data.astype(np.int8) if name == "blk.0.attn_q.weight" else data)

    monkeypatch.setattr(GGUFWriter, "add_tensor", as_integers)
    path = write_random_gguf(tmp_path / "m.gguf")
    found = {tensor.name: tensor.tensor_type for tensor in GGUFReader(path).tensors}
    assert found["blk.0.attn_q.weight"] == GGMLQuantizationType.I8
    with pytest.raises(GGUFError, match=r"blk\.0\.attn_q\.weight as I8"):
        Export.prepare(path)


def test_the_config_says_what_the_keys_do_in_every_published_form(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "m.gguf", context=777)
    export_checkpoint(path, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 1e7
    assert (raw["scoring_func"], raw["topk_method"]) == ("sigmoid", "noaux_tc")
    assert raw["rms_norm_eps"] == 1e-5
    config = AutoConfig.from_pretrained(tmp_path / "out")
    for name in vars(CONFIG).keys() - {"rope_theta", "max_position_embeddings"}:
        assert getattr(config, name) == getattr(CONFIG, name), name
    assert config.rope_parameters["rope_theta"] == 1e7
    assert config.max_position_embeddings == 777
    assert (config.n_group, config.topk_group) == (1, 1)
    assert set(config.layer_types) == {"full_attention"}


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(Dots1Error, match="no such file"):
        Export.prepare(tmp_path / "none.gguf")
