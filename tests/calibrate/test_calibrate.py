"""Calibration: against llama-imatrix, and against the whole model in torch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import Dots1ForCausalLM

from dots1_local.calibrate.calibrate import calibrate
from dots1_local.calibrate.coverage import Coverage, coverage, shrink
from dots1_local.convert.tokenizer import write_vocabulary
from dots1_local.engine.engine import Vocabulary
from dots1_local.errors import CheckpointError, Dots1Error, UsageError
from dots1_local.evaluate.perplexity import read_text
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.quant.imatrix_file import load_importance
from dots1_local.quant.importance import Importance
from dots1_local.reference.model import logits as whole_logits
from tests.calibrate.calibration import LAYERS, Sink, random_tokens, run
from tests.goldens.make_calibrate_goldens import CHUNKS, GOLDEN, N_CTX, STEP
from tests.micro import micro_checkpoint


@pytest.fixture(scope="module")
def measured(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Importance:
    """The example's importance on the tokens that llama-imatrix had for the golden."""
    folder, checkpoint = tmp_path_factory.mktemp("tiny"), Checkpoint.open(tiny)
    write_vocabulary(checkpoint, folder / "vocabulary.gguf")
    with Vocabulary.load(folder / "vocabulary.gguf") as vocabulary:
        tokens = vocabulary.tokenize(read_text(tiny / "heldout.txt"), special=False)
    chunks = np.array(tokens[: CHUNKS * N_CTX], np.int32).reshape(CHUNKS, N_CTX)
    calibrate(
        checkpoint,
        folder / "out",
        chunks,
        datasets=["heldout.txt"],
        least=0,
        threads=1,
        sensitivity=False,
    )
    return load_importance(folder / "out" / "imatrix.gguf")


def test_importance_equals_llama_imatrixs(measured: Importance) -> None:
    """To 1e-4 almost everywhere; another CPU may choose another expert in a near tie."""
    stock = load_importance(GOLDEN)
    assert (measured.datasets, measured.chunk_count, measured.chunk_size) == (
        stock.datasets,
        stock.chunk_count,
        stock.chunk_size,
    )
    assert set(measured.tensors) == {*stock.tensors, "output.weight"}
    deviations = []
    for name, entry in stock.tensors.items():
        ours, theirs = measured.sums(name)[:, ::STEP], stock.sums(name)
        np.testing.assert_allclose(measured.tensors[name].counts, entry.counts, atol=2)
        deviations.append((abs(ours - theirs) / (theirs + 1e-9)).ravel())
    assert np.quantile(np.concatenate(deviations), 0.99) < 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_head_equals_transformers_last_hidden_state(tmp_path: Path, tied: bool) -> None:
    """The squares of transformers' last hidden state, summed over tokens."""
    folder = micro_checkpoint(tmp_path / "hf", tie_word_embeddings=tied)
    tokens = random_tokens(3)
    run(Checkpoint.open(folder), tmp_path / "out", tokens)
    index = load_importance(tmp_path / "out" / "imatrix.gguf")
    model = Dots1ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        states = model.model(torch.from_numpy(tokens).long()).last_hidden_state
    expected = states.square().sum((0, 1)).numpy()
    np.testing.assert_allclose(index.sums("output.weight")[0], expected, rtol=1e-4)
    assert index.tensors["output.weight"].counts == tokens.size


def test_every_token_is_counted(measured: Importance, tiny: Path) -> None:
    top = Checkpoint.open(tiny).config.num_experts_per_tok
    for name, entry in measured.tensors.items():
        assert entry.counts.sum() == CHUNKS * N_CTX * (top if "_exps" in name else 1)


@pytest.mark.parametrize("layers", [1, LAYERS])
def test_logits_equal_the_references(tmp_path: Path, layers: int) -> None:
    """Experts applied to all chunks give the logits that the whole model gives per chunk."""
    checkpoint = Checkpoint.open(micro_checkpoint(tmp_path / "hf", num_hidden_layers=layers))
    tokens = random_tokens(3)
    sink = Sink(3, 15, checkpoint.config.vocab_size)
    other = random_tokens(2, seed=1)
    calibrate(
        checkpoint,
        tmp_path / "out",
        other,
        evaluation=tokens,
        logits=sink,
        threads=1,
        sensitivity=False,
    )
    whole = whole_logits(checkpoint, torch.from_numpy(tokens).long()).numpy()
    np.testing.assert_allclose(sink.rows, whole[:, 16:-1], atol=1e-5)


def test_evaluation_changes_no_bit_of_the_importance(
    micro: Checkpoint, expected: bytes, tmp_path: Path
) -> None:
    other = random_tokens(3, seed=1)
    assert run(micro, tmp_path / "out", random_tokens(6), evaluation=other) == expected


def test_evaluation_alone_writes_no_importance(micro: Checkpoint, tmp_path: Path) -> None:
    none, sink = np.empty((0, 32), np.int32), Sink(2, 15, micro.config.vocab_size)
    tokens = random_tokens(2)
    assert not calibrate(
        micro, tmp_path / "out", none, evaluation=tokens, logits=sink, threads=1, sensitivity=False
    )
    assert np.isfinite(sink.rows).all()
    assert not list((tmp_path / "out").iterdir())


def test_evaluation_alone_keeps_the_importance_file(micro: Checkpoint, tmp_path: Path) -> None:
    importance = run(micro, tmp_path / "out", random_tokens(2))
    none, sink = np.empty((0, 32), np.int32), Sink(2, 15, micro.config.vocab_size)
    tokens = random_tokens(2)
    calibrate(
        micro, tmp_path / "out", none, evaluation=tokens, logits=sink, threads=1, sensitivity=False
    )
    assert np.isfinite(sink.rows).all()
    assert (tmp_path / "out" / "imatrix.gguf").read_bytes() == importance


def test_bf16_is_close_to_f32(micro: Checkpoint, tmp_path: Path) -> None:
    run(micro, tmp_path / "f32", random_tokens(6))
    run(micro, tmp_path / "bf16", random_tokens(6), precision="BF16")
    exact, rounded = (load_importance(tmp_path / f / "imatrix.gguf") for f in ("f32", "bf16"))
    name = "blk.3.attn_output.weight"
    np.testing.assert_allclose(rounded.sums(name), exact.sums(name), rtol=0.05)


def damaged(folder: Path, name: str, value: float) -> Checkpoint:
    """A checkpoint with one bf16 weight replaced."""
    checkpoint = Checkpoint.open(micro_checkpoint(folder, num_hidden_layers=LAYERS))
    piece = checkpoint.locate(name)
    with piece.file.open("r+b") as file:
        file.seek(piece.offset)
        file.write((np.array([value], np.float32).view(np.uint32) >> 16).astype("<u2").tobytes())
    return checkpoint


@pytest.mark.parametrize(
    ("weight", "found"),
    [
        ("model.layers.1.self_attn.v_proj.weight", "model.layers.1.self_attn.o_proj"),
        (
            "model.layers.2.mlp.experts.1.up_proj.weight",
            "model.layers.2.mlp.experts.1.down",
        ),
        ("model.layers.2.mlp.shared_experts.down_proj.weight", "layer 2 is NaN"),
        ("model.norm.weight", "lm_head.weight is NaN"),
        (
            "model.layers.2.mlp.gate.e_score_correction_bias",
            "model.layers.2.mlp.gate.e_score_correction_bias is NaN",
        ),
    ],
)
def test_nan_is_found_in_its_layer(tmp_path: Path, weight: str, found: str) -> None:
    checkpoint = damaged(tmp_path / "hf", weight, np.nan)
    with pytest.raises(CheckpointError, match=found):
        calibrate(checkpoint, tmp_path / "out", random_tokens(6), threads=1, sensitivity=False)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (random_tokens(0), {}, "text"),
        (random_tokens(1, 40000), {}, "32768 tokens"),
        (random_tokens(1) + 1000, {}, "vocabulary"),
        (random_tokens(1), {"device": "cuda:77"}, "no device 'cuda:77' here"),
        (random_tokens(1), {"device": "abacus"}, "no device 'abacus' here"),
        (random_tokens(1), {"device": "meta"}, "no device 'meta' here"),
        (random_tokens(1), {"device": "hpu"}, "no device 'hpu' here"),
    ],
)
def test_impossible_requests_are_refused(
    micro: Checkpoint,
    tmp_path: Path,
    tokens: NDArray[np.int32],
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UsageError, match=message):
        calibrate(micro, tmp_path / "out", tokens, **options, sensitivity=False)
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_one_sentence(
    micro: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10^18 bytes are requested, which torch refuses."""
    monkeypatch.setattr(
        "dots1_local.calibrate.forward.embed", lambda *_: torch.empty(1 << 60, dtype=torch.uint8)
    )
    with pytest.raises(Dots1Error, match="not enough memory to calibrate"):
        calibrate(micro, tmp_path / "out", random_tokens(6), sensitivity=False)


def test_shrinkage_by_hand() -> None:
    """The layer's mean is (66, 22) / 11 = (6, 2); below 4 tokens it takes part."""
    sums = np.array([[50, 10], [16, 12], [0, 0]], np.float32)
    counts = np.array([8, 3, 0], np.float32)
    shrunk, tokens = shrink(sums, counts, least=4)
    np.testing.assert_array_equal(tokens, [8, 3, 1])
    expected = np.array([[50 / 8, 10 / 8], [(16 + 6) / 4, (12 + 2) / 4], [6, 2]])
    np.testing.assert_allclose(shrunk / tokens[:, None], expected, rtol=1e-6)


def test_nothing_is_shrunk_that_was_seen_enough() -> None:
    sums, counts = np.ones((2, 3), np.float32), np.array([4, 5], np.float32)
    for least in (0, 4):
        shrunk, tokens = shrink(sums, counts, least)
        np.testing.assert_array_equal(shrunk, sums)
        np.testing.assert_array_equal(tokens, counts)


def test_coverage_by_hand() -> None:
    counts = np.array([0, 7, 200, 90, 100, 1000], np.float32)
    assert coverage(3, counts) == Coverage(3, 6, unseen=1, rare=3, fewest=0, median=95)
