"""Sensitivity: from the checkpoint to the file."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dots1_local.calibrate.calibrate import calibrate
from dots1_local.convert.budget import load_calibration
from dots1_local.errors import CheckpointError, Dots1Error
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.quant.sensitivity import Sensitivity, load_sensitivity
from dots1_local.reference.model import logits as whole_logits
from tests.calibrate.calibration import (
    BLOCKS_OF_32,
    BLOCKS_OF_256,
    NEEDS_IMPORTANCE,
    Sink,
    probed,
    random_tokens,
    run,
)
from tests.micro import micro_checkpoint

HIDDEN, DENSE, EXPERT = 256, 96, 32  # widths; an expert's may be padded to 256
ATTENTION = {f"attn_{part}" for part in ("q", "k", "v", "output")}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint with one dense and one MoE layer."""
    folder = tmp_path_factory.mktemp("wide")
    return Checkpoint.open(micro_checkpoint(folder, hidden_size=HIDDEN, intermediate_size=DENSE))


@pytest.fixture(scope="module")
def measured(wide: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured") / "out"
    probed(wide, folder, random_tokens(6))
    return folder


def measure(folder: Path, tokens: NDArray[np.int32], **changes: Any) -> Sensitivity:
    """The sensitivity of a micro checkpoint."""
    checkpoint = Checkpoint.open(micro_checkpoint(folder / "hf", **changes))
    probed(checkpoint, folder / "out", tokens)
    return load_calibration(folder / "out")[0]


def test_every_tensor_and_type_is_measured(measured: Path) -> None:
    all_types = BLOCKS_OF_32 | BLOCKS_OF_256
    expected = {
        "token_embd.weight": all_types - NEEDS_IMPORTANCE,
        "output.weight": all_types,
        **{f"blk.{layer}.{name}.weight": all_types for layer in (0, 1) for name in ATTENTION},
        "blk.0.ffn_gate.weight": all_types,
        "blk.0.ffn_up.weight": all_types,
        "blk.0.ffn_down.weight": BLOCKS_OF_32,
        **{f"blk.1.ffn_{part}_{kind}.weight": all_types
           for part in ("gate", "up", "down") for kind in ("exps", "shexp")},
    }  # fmt: skip
    found = load_sensitivity(measured / "sensitivity.json").tensors
    assert {name: set(by_type) for name, by_type in found.items()} == expected


def test_fewer_bits_cause_more_damage(measured: Path) -> None:
    for name, by_type in load_sensitivity(measured / "sensitivity.json").tensors.items():
        damages = [by_type[kind].damage for kind in ("Q8_0", "Q5_0", "IQ4_NL")]
        assert 0 < damages[0] < damages[1] < damages[2], name
        if "Q2_K" in by_type:
            assert damages[2] < by_type["Q3_K"].damage < by_type["Q2_K"].damage, name


def test_the_file_names_its_model_and_importance(wide: Checkpoint, measured: Path) -> None:
    sensitivity, importance = load_calibration(measured)
    sensitivity.check(wide.config)
    imatrix = (measured / "imatrix.gguf").read_bytes()
    assert sensitivity.imatrix == importance.sha256 == hashlib.sha256(imatrix).hexdigest()
    assert sensitivity.tokens == 6 * 32
    assert sensitivity.reference_type == "Q4_0"


def test_the_prediction_for_the_reference_is_the_measured_value(measured: Path) -> None:
    """IQ4_NL is a little better in every tensor, so its prediction is a little lower."""
    raw = json.loads((measured / "sensitivity.json").read_text())
    sensitivity = load_sensitivity(measured / "sensitivity.json")
    predicted = sensitivity.predict(dict.fromkeys(sensitivity.tensors, "IQ4_NL"))
    assert 0.5 < predicted / raw["reference_kl"] < 1


def test_sensitivity_of_another_importance_file_is_refused(
    wide: Checkpoint, measured: Path, tmp_path: Path
) -> None:
    """This happens after --importance-only --force."""
    output = tmp_path / "out"
    assert run(wide, output, random_tokens(2, seed=1))
    (output / "sensitivity.json").write_bytes((measured / "sensitivity.json").read_bytes())
    with pytest.raises(Dots1Error, match="another importance file"):
        load_calibration(output)


def test_without_sensitivity_an_old_one_stays(wide: Checkpoint, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "sensitivity.json").write_text("old")
    calibrate(wide, output, random_tokens(2), threads=1, sensitivity=False)
    assert (output / "sensitivity.json").read_text() == "old"
    with pytest.raises(Dots1Error, match=r"imatrix\.gguf exists"):
        calibrate(wide, output, random_tokens(2), threads=1)
    (output / "imatrix.gguf").unlink()
    with pytest.raises(Dots1Error, match=r"sensitivity\.json exists"):
        calibrate(wide, output, random_tokens(2), threads=1)
    probed(wide, output, random_tokens(2), force=True)


@pytest.mark.parametrize(("limit", "chunks", "positions"), [(20, 1, 20), (32, 1, 32), (100, 3, 32)])
def test_the_number_of_probed_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, chunks: int, positions: int
) -> None:
    """Whole chunks are probed, or the beginning of one."""
    for module in ("calibrate", "forward"):
        monkeypatch.setattr(f"dots1_local.calibrate.{module}.PROBED", limit)
    checkpoint = Checkpoint.open(micro_checkpoint(tmp_path / "hf"))
    shapes: set[tuple[int, ...]] = set()

    def look(done: int, total: int, unit: str, what: str) -> None:
        shapes.update(np.load(file).shape for file in (tmp_path / "out/work").glob("probe-*.npy"))

    probed(checkpoint, tmp_path / "out", random_tokens(7), progress=look)
    assert shapes == {(chunks, positions, 64)}
    assert load_calibration(tmp_path / "out")[0].tokens == chunks * positions


@pytest.mark.parametrize("n_ctx", [1, 16])
def test_one_tiny_chunk_suffices(tmp_path: Path, n_ctx: int) -> None:
    assert measure(tmp_path, random_tokens(1, n_ctx)).tokens == n_ctx


def test_only_routers_with_a_choice_flip(tmp_path: Path) -> None:
    """Nothing flips without routers, or if all experts are always chosen."""
    tokens = random_tokens(4)
    for name, changes in {
        "dense": {"first_k_dense_replace": 2},
        "all": {"num_experts_per_tok": 4},
    }.items():
        found = measure(tmp_path / name, tokens, **changes)
        effects = [effect for by_type in found.tensors.values() for effect in by_type.values()]
        assert {effect.flips for effect in effects} == {0}
        assert min(effect.damage for effect in effects) > 0
    found = measure(tmp_path / "some", tokens, num_hidden_layers=3)
    assert found.tensors["blk.0.attn_q.weight"]["Q8_0"].flips > 0
    assert found.tensors["output.weight"]["Q8_0"].flips == 0


def test_a_tied_head_is_not_the_embedding(tmp_path: Path) -> None:
    """The matrix has two uses, each with its own costs."""
    found = measure(tmp_path, random_tokens(4), tie_word_embeddings=True).tensors
    head, embedding = found["output.weight"]["Q8_0"], found["token_embd.weight"]["Q8_0"]
    assert head.damage > 0
    assert embedding.damage > 0
    assert head.damage != embedding.damage


def test_rows_that_no_type_fits_have_no_effects(tmp_path: Path) -> None:
    found = measure(tmp_path, random_tokens(4), hidden_size=80, intermediate_size=80)
    assert found.tensors["blk.0.ffn_down.weight"] == {}
    assert found.tensors["blk.1.ffn_gate_exps.weight"] == {}
    assert set(found.tensors["blk.1.ffn_down_exps.weight"]) == BLOCKS_OF_32 | BLOCKS_OF_256
    assert found.predict({"blk.0.ffn_down.weight": "F16"}) == 0


def test_logits_equal_the_references(wide: Checkpoint, tmp_path: Path) -> None:
    """The backward pass comes between the residual stream's last layer and the logits."""
    tokens, other = random_tokens(3), random_tokens(2, seed=1)
    sink = Sink(3, 15, wide.config.vocab_size)
    probed(wide, tmp_path / "out", other, evaluation=tokens, logits=sink)
    whole = whole_logits(wide, torch.from_numpy(tokens).long()).numpy()
    np.testing.assert_allclose(sink.rows, whole[:, 16:-1], atol=1e-5)


def test_progress_covers_both_passes(wide: Checkpoint, tmp_path: Path) -> None:
    reports: list[tuple[int, int, str]] = []

    def keep(done: int, total: int, unit: str, what: str) -> None:
        reports.append((done, total, what))

    probed(wide, tmp_path / "out", random_tokens(2), progress=keep)
    amounts = [done for done, _, _ in reports]
    assert amounts == sorted(amounts)
    (total,) = {total for _, total, _ in reports}
    assert amounts[-1] == total
    names = list(dict.fromkeys(what for _, _, what in reports))
    assert names == ["layer 0", "layer 1", "head", "layer 1, backward", "layer 0, backward"]


def damage(checkpoint: Checkpoint, name: str, row: int) -> None:
    """Make the first weight of a row NaN."""
    piece = checkpoint.locate(name)
    with piece.file.open("r+b") as file:
        file.seek(piece.offset + row * piece.shape[-1] * piece.item_bytes)
        file.write(b"\xc0\x7f")


@pytest.mark.parametrize(
    ("weight", "found"),
    [
        ("model.layers.1.mlp.experts.1.up_proj.weight", "model.layers.1.mlp.experts.1.down"),
        ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj"),
        ("lm_head.weight", "gradient at the head"),
    ],
)
def test_nan_is_found(tmp_path: Path, weight: str, found: str) -> None:
    checkpoint = Checkpoint.open(micro_checkpoint(tmp_path / "hf"))
    damage(checkpoint, weight, 5)
    with pytest.raises(CheckpointError, match=found):
        calibrate(checkpoint, tmp_path / "out", random_tokens(6), threads=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["work"]
