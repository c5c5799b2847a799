import re
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray

from dots1_local.engine import engine
from dots1_local.engine.engine import Engine
from dots1_local.errors import GGUFError
from dots1_local.files.gguf import GGUFFile
from dots1_local.placement.model_graph import ModelGraph
from dots1_local.verify import Report, verify_gguf
from tests.helpers import CONFIG, Tensors, random_tensors, write_random_gguf

HIDDEN = CONFIG.hidden_size
USED_SCALES = ("blk.1.attn_v.scale", "blk.2.attn_output.scale")
LOST_SCALES = ("blk.0.ffn_up.scale", "blk.1.ffn_down_exps.scale", "blk.2.ffn_gate_shexp.scale")


def verified(path: Path, **options: object) -> Report:
    return verify_gguf(write_random_gguf(path, **options), quick=True)  # type: ignore[arg-type]


def as_float16(name: str) -> Tensors:
    return {name: random_tensors()[name].astype(np.float16)}


@pytest.mark.parametrize(
    ("without", "sentence"),
    [
        (["blk.1.attn_q.weight", "output.weight"], "lacks blk.1.attn_q.weight, output.weight"),
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
    assert "and 13 more" in report.findings[0].message
    assert report.changes == ()


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("rope_freqs.weight", (16,), "rope_freqs.weight is not part"),
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


def moved(path: Path, places: dict[str, int]) -> Path:
    """Change the header so that tensors begin elsewhere, at these offsets in the data."""
    content = bytearray(path.read_bytes())
    for name, place in places.items():
        raw = name.encode()
        info = content.index(struct.pack("<Q", len(raw)) + raw) + 8 + len(raw)
        (dimensions,) = struct.unpack_from("<I", content, info)
        struct.pack_into("<Q", content, info + 8 + 8 * dimensions, place)
    path.write_bytes(content)
    return path


def places_of(path: Path, *names: str) -> list[int]:
    """Where tensors begin, counted from the first tensor."""
    begin = {tensor.name: tensor.data_offset for tensor in GGUFReader(path).tensors}
    return [begin[name] - min(begin.values()) for name in names]


@pytest.mark.parametrize("wrong", ["gap", "order"])
def test_tensors_have_to_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    path = write_random_gguf(tmp_path / "model.gguf")
    q, k = (f"blk.0.attn_{letter}.weight" for letter in "qk")
    at_q, at_k, last = places_of(path, q, k, "output.weight")
    places = {"output.weight": last + 32} if wrong == "gap" else {q: at_k, k: at_q}
    with path.open("ab") as file:
        file.write(bytes(32))
    (finding,) = verify_gguf(moved(path, places), quick=True).findings
    assert (finding.check, finding.severity) == ("offsets", "error")
    assert ("output.weight" if wrong == "gap" else q) in finding.message
    monkeypatch.setattr(engine, "check_loadable", lambda _: None)  # llama.cpp's own word counts
    with pytest.raises(GGUFError, match=r"llama\.cpp cannot load"):
        Engine.open(path, n_ctx=64, threads=1)


def test_bytes_behind_the_last_tensor_are_noted(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "model.gguf")
    with path.open("ab") as file:
        file.write(b"\xff" * 1000)
    (finding,) = verify_gguf(path, quick=True).findings
    assert (finding.severity, finding.message[:10]) == ("note", "1000 bytes")
    Engine.open(path, n_ctx=64, threads=1).close()


def test_fused_attention_is_as_good_as_llama_cpp_finds_it(tmp_path: Path) -> None:
    tensors, parts = random_tensors(), [f"blk.1.attn_{letter}.weight" for letter in "qkv"]
    fused = {"blk.1.attn_qkv.weight": np.concatenate([tensors[part] for part in parts])}
    path = tmp_path / "model.gguf"
    assert verified(path, tensors=fused, without=parts).findings == ()
    with Engine.open(path, n_ctx=64, threads=1) as fused_engine:
        assert np.isfinite(fused_engine.decode([1, 2, 3], 0)).all()


def logits(path: Path) -> NDArray[np.float32]:
    with Engine.open(path, n_ctx=64, threads=1) as opened:
        return opened.decode([1, 2, 3], 0).copy()


@pytest.mark.parametrize("name", [*USED_SCALES, *LOST_SCALES])
def test_scales_that_llama_cpp_reads_but_does_not_use_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    twice = {name: np.full(CONFIG.n_routed_experts if "_exps" in name else 1, 2, np.float32)}
    path = write_random_gguf(tmp_path / "scaled.gguf", tensors=twice)
    (finding,) = verify_gguf(path).findings
    assert name in finding.message
    if name in LOST_SCALES:
        with pytest.raises(GGUFError, match=re.escape(name)):
            Engine.open(path, n_ctx=64, threads=1)
        monkeypatch.setattr(engine, "check_loadable", lambda _: None)
    used = not np.array_equal(logits(path), logits(write_random_gguf(tmp_path / "plain.gguf")))
    assert used == (name in USED_SCALES)
    assert finding.severity == ("note" if used else "error")


@pytest.mark.parametrize("name", ["blk.1.attn_v.input_scale", "blk.0.ffn_up.input_scale"])
def test_scales_of_inputs_change_nothing(tmp_path: Path, name: str) -> None:
    path = write_random_gguf(tmp_path / "m.gguf", tensors={name: np.full(1, 2, np.float32)})
    assert verify_gguf(path).findings == ()
    np.testing.assert_array_equal(logits(path), logits(write_random_gguf(tmp_path / "plain.gguf")))


@pytest.mark.parametrize("name", ["output.scale", "token_embd.scale", "blk.1.attn_v.weight_scale"])
def test_other_scales_are_refused_as_llama_cpp_refuses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = write_random_gguf(tmp_path / "m.gguf", tensors={name: np.full(1, 2, np.float32)})
    (finding,) = verify_gguf(path).findings
    assert (finding.severity, name in finding.message) == ("error", True)
    monkeypatch.setattr(engine, "check_loadable", lambda _: None)
    with pytest.raises(GGUFError, match="wrong number of tensors"):
        logits(path)


def test_a_graph_counts_matrices_and_not_their_scales(tmp_path: Path) -> None:
    scale = {"blk.1.attn_v.scale": np.full(1, 2, np.float32)}
    scaled = write_random_gguf(tmp_path / "scaled.gguf", tensors=scale)
    plain = write_random_gguf(tmp_path / "plain.gguf")
    found, expected = (ModelGraph.read(GGUFFile.open(path)).ops for path in (scaled, plain))
    assert found == expected
