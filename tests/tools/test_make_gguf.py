from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error
from dots1_local.files.gguf import GGUFFile
from dots1_local.verify import verify_gguf
from tests.micro import micro_config
from tools.make_gguf import main, write_gguf
from tools.make_wide import published_config


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = micro_config(
        hidden_size=256,
        num_hidden_layers=4,
        moe_intermediate_size=64,
        n_routed_experts=16,
        vocab_size=2048,
    )
    return write_gguf(tmp_path_factory.mktemp("made") / "small.gguf", config)


def test_nothing_is_wrong_with_it(small: Path) -> None:
    assert not verify_gguf(small).findings


def test_runs_in_the_engine(small: Path) -> None:
    with Engine.open(small, threads=1) as engine:
        logits = engine.decode(range(100, 140), 0).copy()
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


def test_importance_is_made_up_for_types_that_need_it(tmp_path: Path) -> None:
    config = micro_config(hidden_size=256, moe_intermediate_size=256)
    path = write_gguf(tmp_path / "low.gguf", config, "DQ2")
    types = {tensor.name: tensor.type for tensor in GGUFFile.open(path).tensors}
    assert types["blk.1.ffn_gate_exps.weight"] == "IQ2_XXS"
    assert not verify_gguf(path).findings


def test_tokens_spread_evenly_over_experts(small: Path) -> None:
    tensors = {tensor.name: tensor for tensor in GGUFReader(small).tensors}
    embedding = _floats(tensors["token_embd.weight"])
    embedding /= np.sqrt((embedding**2).mean(axis=1, keepdims=True))
    used = []
    for layer in (1, 2, 3):
        scores = embedding @ _floats(tensors[f"blk.{layer}.ffn_gate_inp.weight"]).T
        scores = 1 / (1 + np.exp(-scores)) + _floats(tensors[f"blk.{layer}.exp_probs_b.bias"])
        chosen = np.argsort(scores, axis=1)[:, -2:]
        counts = np.bincount(chosen.reshape(-1), minlength=16)
        assert counts.min() > counts.mean() * 0.6
        assert counts.max() < counts.mean() * 1.4
        used.append(chosen)
    assert not np.array_equal(used[0], used[1])


def test_other_weights_repeat_in_every_layer(small: Path) -> None:
    data = {tensor.name: tensor.data for tensor in GGUFReader(small).tensors}
    for part in ("attn_q", "ffn_down_exps", "ffn_up_shexp"):
        one, two = (data[f"blk.{layer}.{part}.weight"] for layer in (1, 2))
        np.testing.assert_array_equal(one, two)


def test_long_tensors_repeat_what_was_made(tmp_path: Path) -> None:
    config = micro_config(hidden_size=512, vocab_size=20_000)  # the embedding: 10 million weights
    path = write_gguf(tmp_path / "wide.gguf", config)
    embedding = next(t for t in GGUFReader(path).tensors if t.name == "token_embd.weight").data
    rows = (4 << 20) // 512
    np.testing.assert_array_equal(embedding[rows : 2 * rows], embedding[:rows])
    np.testing.assert_array_equal(embedding[2 * rows :], embedding[: 20_000 - 2 * rows])
    assert len(np.unique(embedding[:64], axis=0)) == 64


def test_headers_alone_describe_the_published_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "full.gguf", published_config(), headers_only=True)
    assert path.stat().st_size == pytest.approx(89.6e9, abs=0.05e9)  # as the README has DQ4
    assert path.stat().st_blocks * 512 < 20e6
    gguf = GGUFFile.open(path)
    assert gguf.keys["dots1.block_count"] == 62
    shapes = {tensor.name: tensor.shape for tensor in gguf.tensors}
    assert shapes["blk.61.ffn_down_exps.weight"] == (128, 4096, 1408)
    assert shapes["output.weight"] == (152064, 4096)


def test_what_the_disk_cannot_hold_is_refused(tmp_path: Path) -> None:
    config = published_config(num_hidden_layers=500, n_routed_experts=1024)
    with pytest.raises(Dots1Error, match=r"GB free, but huge\.gguf needs"):
        write_gguf(tmp_path / "huge.gguf", config)
    assert not list(tmp_path.iterdir())


def test_a_seed_that_is_none_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="non-negative"):
        write_gguf(tmp_path / "bad.gguf", micro_config(), seed=-1)
    assert not list(tmp_path.iterdir())


def test_heads_that_the_engine_would_end_the_process_over_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "odd.gguf"
    monkeypatch.setattr("sys.argv", ["make_gguf", str(path), "--hidden", "64", "--heads", "3"])
    with pytest.raises(SystemExit, match="no even head dimension"):
        main()
    assert not path.exists()


def _floats(tensor: Any) -> NDArray[np.float32]:
    values: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    return values
