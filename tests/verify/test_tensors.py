from pathlib import Path

import numpy as np
import pytest

from dots1_local.runtime.engine import Engine
from dots1_local.verify import Report, verify_gguf
from tests.helpers import CONFIG, Tensors, random_tensors, write_random_gguf

HIDDEN = CONFIG.hidden_size


def verified(path: Path, **options: object) -> Report:
    return verify_gguf(write_random_gguf(path, **options), quick=True)  # type: ignore[arg-type]


def as_float16(name: str) -> Tensors:
    return {name: random_tensors()[name].astype(np.float16)}


@pytest.mark.parametrize(
    ("without", "sentence"),
    [
        (["blk.1.attn_q.weight", "output.weight"], "blk.1.attn_q.weight, output.weight missing"),
        (["blk.2.exp_probs_b.bias"], "silently chooses experts without it"),
        ([f"blk.2.{part}.weight" for part in ("attn_norm", "ffn_norm")], "blk.2.ffn_norm.weight"),
    ],
)
def test_names_tensors_that_are_missing(tmp_path: Path, without: list[str], sentence: str) -> None:
    (finding,) = verified(tmp_path / "model.gguf", without=without).findings
    assert finding.severity == "error"
    assert sentence in finding.message


def test_a_lost_layer_is_not_corrected_away(tmp_path: Path) -> None:
    lost = [name for name in random_tensors() if name.startswith("blk.2.")]
    report = verified(tmp_path / "model.gguf", without=lost)
    assert "and 13 more missing" in report.findings[0].message
    assert report.changes == ()


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("rope_freqs.weight", (16,), "rope_freqs.weight is no part"),
        ("blk.0.attn_q.bias", (HIDDEN,), "llama.cpp adds it"),
        ("blk.1.attn_k.weight", (HIDDEN, 32), "blk.1.attn_k.weight is 64×32 where"),
        ("output.weight", (CONFIG.vocab_size - 1, HIDDEN), "for output.weight of [267, 64]"),
    ],
)
def test_names_tensors_that_are_too_many_or_misshaped(
    tmp_path: Path, name: str, shape: tuple[int, ...], sentence: str
) -> None:
    report = verified(tmp_path / "model.gguf", tensors={name: np.zeros(shape, np.float32)})
    assert not report.ok
    assert any(sentence in finding.message for finding in report.findings)


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_norm.weight",
        "blk.1.attn_q_norm.weight",
        "output_norm.weight",
        "blk.1.exp_probs_b.bias",
    ],
)
def test_norms_and_router_biases_have_to_be_f32(tmp_path: Path, name: str) -> None:
    (finding,) = verified(tmp_path / "model.gguf", tensors=as_float16(name)).findings
    assert (finding.check, finding.severity) == ("norms", "error")
    assert finding.message.startswith(f"{name} is F16 where F32 is needed")


def test_a_router_should_be_f32(tmp_path: Path) -> None:
    tensors = as_float16("blk.1.ffn_gate_inp.weight")
    (finding,) = verified(tmp_path / "model.gguf", tensors=tensors).findings
    assert (finding.check, finding.severity) == ("router", "warning")


def test_fused_attention_is_as_good_as_llama_cpp_finds_it(tmp_path: Path) -> None:
    tensors, parts = random_tensors(), [f"blk.1.attn_{letter}.weight" for letter in "qkv"]
    fused = {"blk.1.attn_qkv.weight": np.concatenate([tensors[part] for part in parts])}
    path = tmp_path / "model.gguf"
    assert verified(path, tensors=fused, without=parts).findings == ()
    with Engine.open(path, n_ctx=64, threads=1) as engine:
        assert np.isfinite(engine.decode([1, 2, 3], 0)).all()
