"""Sensitivity with refined rows: against whole matrices refined by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dots1_local.calibrate.calibrate import calibrate
from dots1_local.errors import UsageError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.ggml import TYPES
from dots1_local.quant.encode import decode, encode
from dots1_local.quant.sensitivity import Effect, load_sensitivity
from dots1_local.reference.layers import layer_forward
from dots1_local.reference.model import load_layers, load_outer
from dots1_local.refine.matrix import refine_matrix
from dots1_local.refine.metric import Metric, input_metric
from tests.calibrate.calibration import BLOCKS_OF_32, BLOCKS_OF_256, random_tokens
from tests.micro import micro_checkpoint

HIDDEN = 256
TOKENS = random_tokens(40, 128)
Tensors = Mapping[str, Mapping[str, Effect]]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("wide")
    return Checkpoint.open(micro_checkpoint(folder, hidden_size=HIDDEN, moe_intermediate_size=64))


@pytest.fixture(scope="module")
def calibrated(wide: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured") / "out"
    with pytest.MonkeyPatch.context() as patch:  # fewer rows are faster
        patch.setattr("dots1_local.calibrate.refinement_sample._ROWS", 64)
        calibrate(wide, folder, TOKENS, refine=True, threads=1)
    return folder


@pytest.fixture(scope="module")
def plain(calibrated: Path) -> Tensors:
    return load_sensitivity(calibrated / "sensitivity.json").tensors


@pytest.fixture(scope="module")
def refined(calibrated: Path) -> Tensors:
    return load_sensitivity(calibrated / "sensitivity-refined.json").tensors


def test_the_files_differ_in_effects_only(calibrated: Path) -> None:
    first, second = (
        json.loads((calibrated / name).read_text())
        for name in ("sensitivity.json", "sensitivity-refined.json")
    )
    tensors = first.pop("tensors"), second.pop("tensors")
    assert first == second
    plain, refined = ({name: set(kinds) for name, kinds in each.items()} for each in tensors)
    assert plain == refined


def test_refined_rows_cause_less_damage(plain: Tensors, refined: Tensors) -> None:
    """Except in an embedding that is not trained: tokens know nothing of each other's gradients."""
    for name, by_type in (item for item in refined.items() if item[0] != "token_embd.weight"):
        for kind, effect in by_type.items():
            before = plain[name][kind]
            if kind == "MXFP4":  # is not refined
                assert effect == before
            else:
                assert 0 < effect.damage < 1.02 * before.damage, (name, kind)
                assert effect.error < 1.02 * before.error, (name, kind)


def test_rounded_activations_cost_what_they_did(plain: Tensors, refined: Tensors) -> None:
    """Solved from both damages of a type: each block size has one such cost."""
    for name in ("blk.0.attn_q.weight", "blk.1.ffn_up_exps.weight", "blk.1.ffn_gate_shexp.weight"):
        for kinds in (BLOCKS_OF_32, BLOCKS_OF_256):
            costs = []
            for kind in kinds - {"MXFP4"}:
                before, after = plain[name][kind], refined[name][kind]
                ratio = after.error / before.error
                costs.append((after.damage - ratio * before.damage) / (1 - ratio))
            assert min(costs) > 0
            np.testing.assert_allclose(costs, np.mean(costs), rtol=0.02)


def inputs_of(checkpoint: Checkpoint, tokens: np.ndarray, wanted: str) -> np.ndarray:
    """All rows that one matrix is multiplied by, from the whole model."""
    rows: list[torch.Tensor] = []
    x = torch.from_numpy(load_outer(checkpoint)["model.embed_tokens.weight"].numpy()[tokens])
    for layer, weights in enumerate(load_layers(checkpoint)):

        def observe(name: str, values: torch.Tensor, layer: int = layer) -> None:
            if f"model.layers.{layer}.{name}" == wanted:
                rows.append(values)

        with torch.no_grad():
            x = layer_forward(x, weights, checkpoint.config, layer, observe)
    return torch.cat(rows).numpy()


@pytest.mark.parametrize(
    ("tensor", "source"),
    [
        ("blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight"),
        ("blk.1.ffn_up_shexp.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"),
    ],
)
@pytest.mark.parametrize("kind", ["Q3_K", "IQ4_NL"])
def test_the_error_is_that_of_the_whole_matrix_on_held_out_rows(
    wide: Checkpoint, plain: Tensors, refined: Tensors, tensor: str, source: str, kind: str
) -> None:
    found = refined[tensor][kind].error / plain[tensor][kind].error
    weights, rows = wide.read(source), inputs_of(wide, TOKENS, source)
    held = np.arange(0, len(rows), 12)
    others = np.delete(rows, held, axis=0)
    moment = others.T @ others / np.float32(len(others))
    metric = Metric(input_metric(moment, len(others)))
    data = refine_matrix(weights, TYPES[kind], metric, None, columns=HIDDEN).data

    def error(stored: np.ndarray) -> np.ndarray:
        return decode(stored, TYPES[kind], HIDDEN) - weights

    ours = np.square(rows[held] @ error(data).T).sum() / len(held)
    squares = np.square(rows[held]).mean(axis=0)
    ggmls = error(encode(weights, TYPES[kind], np.diag(moment).copy()))
    assert found == pytest.approx(ours / (np.square(ggmls) @ squares).sum(), rel=0.1)


def test_the_shortest_text(tmp_path: Path) -> None:
    """Experts without tokens, and those whose only token is held out, keep ggml's errors."""
    checkpoint = Checkpoint.open(micro_checkpoint(tmp_path / "hf", n_routed_experts=64))
    with pytest.raises(UsageError, match=r"has 63 tokens.* at least 64"):
        calibrate(checkpoint, tmp_path / "out", random_tokens(1, 63), refine=True, threads=1)
    calibrate(checkpoint, tmp_path / "out", random_tokens(1, 64), refine=True, threads=1)
    found = load_sensitivity(tmp_path / "out" / "sensitivity-refined.json").tensors
    effects = [effect for by_type in found.values() for effect in by_type.values()]
    assert all(np.isfinite(effect.damage) for effect in effects)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"hidden_size": 80, "intermediate_size": 80},  # no type fits some rows
        {"first_k_dense_replace": 2},
        {"num_experts_per_tok": 4},
    ],
)
def test_unusual_models(tmp_path: Path, changes: dict[str, Any]) -> None:
    checkpoint = Checkpoint.open(micro_checkpoint(tmp_path / "hf", **changes))
    calibrate(checkpoint, tmp_path / "out", random_tokens(4), refine=True, threads=1)
    plain, refined = (
        load_sensitivity(tmp_path / "out" / name).tensors
        for name in ("sensitivity.json", "sensitivity-refined.json")
    )
    assert {n: set(kinds) for n, kinds in plain.items()} == {
        n: set(kinds) for n, kinds in refined.items()
    }
