"""What conversion writes, against gguf-py's reader and hand-made checkpoints."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, TokenType, quants
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from dots1_local.cli import app
from dots1_local.convert import Conversion, convert_checkpoint
from dots1_local.quant.imatrix_file import write_imatrix
from tests.micro import micro_checkpoint

WIDTHS = {"hidden_size": 256, "moe_intermediate_size": 192, "intermediate_size": 704}


def tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Type and raw bytes of every tensor, as gguf-py reads them."""
    return {t.name: (t.tensor_type.name, np.array(t.data)) for t in GGUFReader(path).tensors}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_f32_holds_the_checkpoint_exactly(tmp_path: Path) -> None:
    source = micro_checkpoint(tmp_path / "hf", shards=2)
    convert_checkpoint(source, tmp_path / "out.gguf", "F32")
    found = tensors(tmp_path / "out.gguf")
    weights = _torch_weights(source)
    stacked = np.stack(
        [weights[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(4)]
    )
    np.testing.assert_array_equal(found["blk.1.ffn_down_exps.weight"][1], stacked)
    np.testing.assert_array_equal(
        found["blk.0.attn_q.weight"][1], weights["model.layers.0.self_attn.q_proj.weight"]
    )
    np.testing.assert_array_equal(
        found["blk.1.exp_probs_b.bias"][1],
        weights["model.layers.1.mlp.gate.e_score_correction_bias"],
    )
    assert len(found) == 3 + 2 * 8 + 3 + 8


def _torch_weights(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor as float32, by the safetensors library."""
    from safetensors.torch import load_file as load_torch

    return {
        name: value.float().numpy()
        for shard in sorted(folder.glob("*.safetensors"))
        for name, value in load_torch(shard).items()
    }


@pytest.mark.parametrize("padding", ["off", "on"])
def test_padding_adds_zeros_only(tmp_path: Path, padding: str) -> None:
    source = micro_checkpoint(tmp_path / "hf", **WIDTHS)
    convert_checkpoint(source, tmp_path / "out.gguf", "F32", padding=padding)  # type: ignore[arg-type]
    found = tensors(tmp_path / "out.gguf")
    width = 256 if padding == "on" else 192
    down, gate = found["blk.1.ffn_down_exps.weight"][1], found["blk.1.ffn_gate_exps.weight"][1]
    assert down.shape == (4, 256, width)
    assert gate.shape == (4, width, 256)
    assert found["blk.1.ffn_up_shexp.weight"][1].shape == (2 * width, 256)
    weights = _torch_weights(source)
    expert = "model.layers.1.mlp.experts.3."
    np.testing.assert_array_equal(down[3, :, :192], weights[f"{expert}down_proj.weight"])
    np.testing.assert_array_equal(gate[3, :192], weights[f"{expert}gate_proj.weight"])
    assert not down[:, :, 192:].any()
    assert not gate[:, 192:].any()
    reader = GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["dots1.expert_feed_forward_length"].contents() == width


def test_padded_rows_of_a_low_type_decode_to_zero(tmp_path: Path) -> None:
    source = micro_checkpoint(tmp_path / "hf", **WIDTHS)
    convert_checkpoint(source, tmp_path / "out.gguf", "Q2_K", padding="on")
    kind, raw = tensors(tmp_path / "out.gguf")["blk.1.ffn_up_exps.weight"]
    rows = quants.dequantize(raw, GGMLQuantizationType[kind])
    assert not rows[:, 192:].any()
    assert rows[:, :192].any()


def test_packed_expert_names_give_the_same_file(tmp_path: Path) -> None:
    source = micro_checkpoint(tmp_path / "hf")
    packed = micro_checkpoint(tmp_path / "packed" / "hf")
    weights = load_file_bf16_as_bits(packed / "model.safetensors")
    prefix = "model.layers.1.mlp.experts"
    parts = {
        part: np.stack([weights.pop(f"{prefix}.{e}.{part}_proj.weight") for e in range(4)])
        for part in ("gate", "up", "down")
    }
    weights[f"{prefix}.gate_up_proj"] = np.concatenate([parts["gate"], parts["up"]], axis=1)
    weights[f"{prefix}.down_proj"] = parts["down"]
    write_bf16_bits(weights, packed / "model.safetensors")
    for folder in (source, packed):
        convert_checkpoint(folder, tmp_path / f"{folder.parent.name}.gguf", "Q8_0")
    assert digest(tmp_path / "packed.gguf") == digest(tmp_path / f"{tmp_path.name}.gguf")


def load_file_bf16_as_bits(path: Path) -> dict[str, np.ndarray]:
    import torch
    from safetensors.torch import load_file as load_torch

    return {n: t.view(torch.uint16).numpy().copy() for n, t in load_torch(path).items()}


def write_bf16_bits(weights: dict[str, np.ndarray], path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    save_torch({n: torch.from_numpy(w).view(torch.bfloat16) for n, w in weights.items()}, path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_other_input_types_are_read(tmp_path: Path, dtype: type) -> None:
    source = micro_checkpoint(tmp_path / "hf")
    weights: dict[str, np.ndarray] = {
        name: value.astype(dtype) for name, value in _torch_weights(source).items()
    }
    save_file(weights, source / "model.safetensors")
    convert_checkpoint(source, tmp_path / "out.gguf", "F32")
    found = tensors(tmp_path / "out.gguf")
    name = "model.layers.0.mlp.down_proj.weight"
    saved = load_file(source / "model.safetensors")[name]
    assert saved.dtype == dtype
    np.testing.assert_array_equal(found["blk.0.ffn_down.weight"][1], saved.astype(np.float32))


def test_keys(tiny: Path, converted) -> None:  # type: ignore[no-untyped-def]
    fields = GGUFReader(converted("DQ4")).fields
    keys = {name: field.contents() for name, field in fields.items()}
    config = json.loads((tiny / "config.json").read_text())
    ids = {t["content"]: t["id"] for t in _tokenizer(tiny)["added_tokens"]}
    assert keys["general.architecture"] == "dots1"
    assert keys["dots1.expert_gating_func"] == 2  # sigmoid
    assert keys["dots1.expert_weights_scale"] == config["routed_scaling_factor"]
    assert keys["dots1.expert_weights_norm"] is True
    assert keys["dots1.expert_shared_count"] == 2
    assert keys["dots1.leading_dense_block_count"] == 1
    assert keys["dots1.rope.freq_base"] == config["rope_theta"]
    assert keys["dots1.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert keys["tokenizer.ggml.pre"] == "qwen2"
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.ggml.bos_token_id" not in keys
    assert keys["tokenizer.ggml.eos_token_id"] == ids["<|endofresponse|>"]
    assert keys["tokenizer.ggml.eot_token_id"] == ids["<|endoftext|>"]
    assert "<|response|>" in keys["tokenizer.chat_template"]
    assert keys["general.license"] == "mit"
    assert keys["dots1_local.recipe"] == "DQ4"
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == config["vocab_size"]
    assert tokens[-1] == f"[PAD{config['vocab_size'] - 1}]"
    assert types[-1] == TokenType.UNUSED
    assert types[ids["<|endofresponse|>"]] == TokenType.CONTROL


def _tokenizer(folder: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((folder / "tokenizer.json").read_text())  # type: ignore[no-any-return]


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    source = micro_checkpoint(tmp_path / "hf")
    whole = convert_checkpoint(source, tmp_path / "one.gguf", "Q8_0").paths
    shards = convert_checkpoint(source, tmp_path / "many.gguf", "Q8_0", split_max_size=20_000).paths
    assert len(whole) == 1
    assert len(shards) > 3
    assert shards[0].name == f"many-00001-of-{len(shards):05}.gguf"
    together = {name: value for path in shards for name, value in tensors(path).items()}
    alone = tensors(whole[0])
    assert together.keys() == alone.keys()
    for name, (kind, raw) in alone.items():
        assert together[name][0] == kind
        np.testing.assert_array_equal(together[name][1], raw)
    keys = GGUFReader(shards[1]).fields
    assert keys["split.no"].contents() == 1
    assert keys["split.tensors.count"].contents() == len(alone)


def test_importance_steers_and_is_recorded(tmp_path: Path) -> None:
    source = micro_checkpoint(tmp_path / "hf", **WIDTHS)
    plain = Conversion.prepare(source, "DQ2", padding="on")
    specs = {t.spec.name: t.spec for t in plain.tensors}
    rng = np.random.default_rng(0)
    name = "blk.1.ffn_up_exps.weight"
    sums = rng.gamma(0.3, size=(4, 256)).astype(np.float32)
    everything = {
        n: (rng.gamma(0.3, size=(len(s.sources), s.source_shape[-1])).astype(np.float32),
            np.ones(len(s.sources), np.float32))
        for n, s in specs.items() if len(s.shape) > 1
    } | {name: (sums, np.ones(4, np.float32))}  # fmt: skip
    write_imatrix(
        tmp_path / "imatrix.gguf", everything, datasets=["text"], chunk_count=1, chunk_size=512
    )
    convert_checkpoint(
        source, tmp_path / "out.gguf", "DQ2", padding="on", imatrix=tmp_path / "imatrix.gguf"
    )
    kind, raw = tensors(tmp_path / "out.gguf")[name]
    assert kind == "IQ2_XXS"
    decoded = quants.dequantize(raw, GGMLQuantizationType.IQ2_XXS)[:, :192]
    weights = _torch_weights(source)
    truth = np.stack([weights[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in range(4)])
    error = (decoded - truth) ** 2
    heavy, light = sums > np.quantile(sums, 0.8), sums < np.quantile(sums, 0.2)
    by_column = error.mean(axis=1)
    assert by_column[heavy].mean() < 0.7 * by_column[light].mean()
    keys = GGUFReader(tmp_path / "out.gguf").fields
    expected = hashlib.sha256((tmp_path / "imatrix.gguf").read_bytes()).hexdigest()
    assert keys["dots1_local.imatrix.sha256"].contents() == expected


def test_the_fast_encoder_changes_its_own_types_only(tiny: Path, tmp_path: Path) -> None:
    both = []
    for encoder in ("ggml", "fast"):
        path = tmp_path / f"{encoder}.gguf"
        command = [
            "convert", tiny, "-o", path, "--imatrix", tiny / "imatrix.gguf", "--encoder", encoder,
            "--tensor-type", "ffn_(gate|up)_exps=IQ4_XS", "--json",
        ]  # fmt: skip
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code == 0
        both.append(tensors(path))
    for (name, (kind, plain)), (_, fast) in zip(both[0].items(), both[1].values(), strict=True):
        assert np.array_equal(plain, fast) == (kind != "IQ4_XS"), name
    fields = GGUFReader(tmp_path / "fast.gguf").fields
    assert fields["dots1_local.encoder"].contents() == "fast"
    assert "dots1_local.encoder" not in GGUFReader(tmp_path / "ggml.gguf").fields
