"""The refining pass: which inputs reach which matrix, and what becomes of those that are kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants

from dots1_local.calibrate.refinement_file import RefinementData
from dots1_local.convert import Conversion, Result
from dots1_local.convert.refined_results import by_part
from dots1_local.errors import CheckpointError, Dots1Error, UsageError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.quant.encode import encode
from dots1_local.reference.model import logits
from dots1_local.refine.arrays import Arrays
from dots1_local.refine.matrix import Refined
from dots1_local.refine.metric import Metric, input_metric, output_metric
from tests.convert.refinement import (
    EXPERTS,
    HIDDEN,
    WIDTH,
    calibration_folder,
    random_tokens,
    sha256,
    small_checkpoint,
)

Floats = np.ndarray
PATCHED = "dots1_local.convert.refined_matrix.refine_matrix"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def calibrated(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration_folder(checkpoint, tmp_path_factory.mktemp("calibrated") / "out")


def prepare(checkpoint: Path, calibrated: Path, recipe: str = "Q2_K", **options: Any) -> Conversion:
    chosen: dict[str, Any] = {"padding": "on", "refine": True} | options
    return Conversion.prepare(checkpoint, recipe, calibration=calibrated, **chosen)


@dataclass(frozen=True)
class Call:
    """What `refine_matrix` was called with."""

    weights: Floats
    metric: Metric
    held_out: Floats | None
    columns: int
    importance: Floats | None


def ggml_bytes(weights: Floats, kind: Any, *, columns: int, importance: Floats | None) -> Refined:
    """What a conversion without refinement writes."""
    missing = columns - weights.shape[1]
    stored = np.pad(weights, ((0, 0), (0, missing)))
    weighed = None if importance is None else np.pad(importance, (0, missing))
    return Refined(encode(stored, kind, weighed), True, 1.0, np.nan)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every call of `refine_matrix`, which returns ggml's bytes."""
    seen: list[Call] = []

    def record(
        weights: Floats,
        kind: Any,
        metric: Metric,
        held_out: Floats | None,
        *,
        columns: int,
        importance: Floats | None = None,
        rounds: int,
        arrays: Arrays,
    ) -> Refined:
        seen.append(Call(weights, metric, held_out, columns, importance))
        return ggml_bytes(weights, kind, columns=columns, importance=importance)

    monkeypatch.setattr(PATCHED, record)
    return seen


@pytest.mark.parametrize(
    ("recipe", "padding"), [("Q2_K", "on"), ("Q4_K_M", "off"), ("DQ3", "off"), ("DQ2", "on")]
)
def test_kept_matrices_have_the_bytes_of_a_plain_conversion(
    checkpoint: Path, calibrated: Path, tmp_path: Path, calls: list[Call], recipe: str, padding: str
) -> None:
    """Without keys, because they tell of refinement."""
    plain, kept = tmp_path / "plain.gguf", tmp_path / "kept.gguf"
    prepare(checkpoint, calibrated, recipe, padding=padding, refine=False).run(plain)
    prepare(checkpoint, calibrated, recipe, padding=padding).run(kept, threads=2)
    assert calls
    expected = {tensor.name: tensor for tensor in GGUFReader(plain).tensors}
    for tensor in GGUFReader(kept).tensors:
        assert tensor.tensor_type == expected[tensor.name].tensor_type
        np.testing.assert_array_equal(tensor.data, expected[tensor.name].data, tensor.name)


def rows_of_all_matrices(source: Path, tokens: Floats) -> dict[str, Floats]:
    """The inputs of each matrix when the whole model is computed at once."""
    seen: dict[str, list[Floats]] = {}

    def observe(name: str, rows: torch.Tensor) -> None:
        seen.setdefault(name, []).append(rows.numpy())

    logits(Checkpoint.open(source), torch.from_numpy(tokens).long(), observe)
    return {name: np.concatenate(rows) for name, rows in seen.items()}


def split(rows: Floats) -> tuple[Floats, Floats]:
    """The mean of x x' over the rows that are not held out, and the others."""
    held = np.arange(len(rows)) % 12 == 0
    fitted = rows[~held].astype(np.float64)
    return (fitted.T @ fitted / len(fitted)).astype(np.float32), rows[held]


def find(calls: list[Call], weights: Floats) -> Call:
    """The call whose rows begin with those of a matrix."""
    found = [each for each in calls if np.array_equal(each.weights[:8], weights[:8])]
    assert len(found) == 1
    return found[0]


def close(found: Floats | None, expected: Floats) -> None:
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * abs(expected).max())


def test_each_matrix_gets_its_metric_and_held_out_rows(
    checkpoint: Path, calibrated: Path, tmp_path: Path, calls: list[Call]
) -> None:
    prepare(checkpoint, calibrated).run(tmp_path / "out.gguf", threads=1)
    source, rows = Checkpoint.open(checkpoint), rows_of_all_matrices(checkpoint, random_tokens())
    data = RefinementData.load(calibrated, source)
    layer = "model.layers.1."
    for name, same, outputs in (
        (f"{layer}self_attn.v_proj.weight", f"{layer}self_attn.q_proj.weight", None),
        (f"{layer}self_attn.o_proj.weight", f"{layer}self_attn.o_proj.weight", 1),
        (f"{layer}mlp.shared_experts.up_proj.weight", f"{layer}mlp.gate.weight", None),
        ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight", 0),
        ("lm_head.weight", None, None),
    ):
        call = find(calls, source.read(name))
        if same is not None:
            mean, held_out = split(rows[same])
            close(call.metric.inputs, input_metric(mean, len(rows[same]) - len(held_out)))
            close(call.held_out, held_out)
        assert (call.metric.outputs is None) == (outputs is None)
        if outputs is not None:
            close(call.metric.outputs, output_metric(data.output_moment(outputs)))


def test_experts_are_shrunk_to_their_layer(
    checkpoint: Path, calibrated: Path, tmp_path: Path, calls: list[Call]
) -> None:
    """Gate and up to the mean of all tokens, down to other tokens put through the expert."""
    prepare(checkpoint, calibrated).run(tmp_path / "out.gguf", threads=1)
    source, rows = Checkpoint.open(checkpoint), rows_of_all_matrices(checkpoint, random_tokens())
    layer = "model.layers.2.mlp."
    everything = rows[f"{layer}gate.weight"]
    for expert in range(EXPERTS):
        names = {part: f"{layer}experts.{expert}.{part}_proj.weight" for part in ("gate", "down")}
        gate, down = (find(calls, source.read(name)) for name in names.values())
        own, held_out = split(rows[names["gate"]])
        tokens = len(rows[names["gate"]]) - len(held_out)
        close(gate.metric.inputs, input_metric(own, tokens, split(everything)[0]))
        close(gate.held_out, held_out)
        hidden = rows[names["down"]]
        close(down.held_out, split(hidden)[1])
        prior = prior_of_down(source, everything, rows[names["gate"]], layer, expert)
        close(down.metric.inputs, input_metric(split(hidden)[0], tokens, prior))
        assert down.metric.outputs is not None
        assert (down.columns, down.weights.shape) == (256, (HIDDEN, WIDTH))


def prior_of_down(
    source: Checkpoint, everything: Floats, own: Floats, layer: str, expert: int
) -> Floats:
    """Every row but the expert's own, by the formula of SwiGLU: there are fewer than 2 * WIDTH."""
    step = max(1, len(everything) // (2 * WIDTH))
    is_own = (abs(everything[:, None] - own[None]).max(-1) < 1e-4).any(1)
    others = everything[::step][~is_own[::step]]
    gate, up = (
        source.read(f"{layer}experts.{expert}.{part}_proj.weight") for part in ("gate", "up")
    )
    gated = others @ gate.T
    return split(gated / (1 + np.exp(-gated)) * (others @ up.T))[0]


def test_an_expert_that_no_token_reached(tmp_path: Path, calls: list[Call]) -> None:
    source = small_checkpoint(tmp_path / "hf")
    avoid_expert(source, layer=1, expert=2)
    folder = calibration_folder(source, tmp_path / "calibrated")
    result = prepare(source, folder).run(tmp_path / "out.gguf", threads=2)
    opened = Checkpoint.open(source)
    prefix = "model.layers.1.mlp."
    rows = rows_of_all_matrices(source, random_tokens())
    for part in ("gate", "down"):
        call = find(calls, opened.read(f"{prefix}experts.2.{part}_proj.weight"))
        assert call.held_out is None
        assert np.isfinite(call.metric.inputs).all()
        if part == "gate":
            prior = split(rows[f"{prefix}gate.weight"])[0]
            close(call.metric.inputs, input_metric(prior, 0, prior))
    assert len(result.refined[-1].matrices) > 0


def avoid_expert(source: Path, layer: int, expert: int) -> None:
    """Give an expert a bias that no score makes up for."""
    from safetensors.torch import load_file, save_file

    name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name][expert] = -100
            save_file(tensors, shard)


@pytest.fixture(scope="module")
def refined(
    checkpoint: Path, calibrated: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Conversion, Result]:
    output = tmp_path_factory.mktemp("refined") / "out.gguf"
    conversion = prepare(checkpoint, calibrated)
    return output, conversion, conversion.run(output, threads=2)


def test_nothing_is_left_beside_the_file(refined: tuple[Path, Conversion, Result]) -> None:
    output, _, _ = refined
    assert list(output.parent.iterdir()) == [output]


def test_the_file_decodes_and_says_that_it_is_refined(
    checkpoint: Path, refined: tuple[Path, Conversion, Result]
) -> None:
    reader = GGUFReader(refined[0])
    assert reader.fields["dots1_local.refinement.tokens"].contents() == random_tokens().size
    assert reader.fields["dots1_local.refinement.datasets"].contents() == "text.txt"
    source = Checkpoint.open(checkpoint)
    for tensor in reader.tensors:
        if tensor.name == "blk.1.ffn_up_exps.weight":
            kind = GGMLQuantizationType(tensor.tensor_type)
            rows = quants.dequantize(np.array(tensor.data), kind)
            weights = source.read("model.layers.1.mlp.experts.3.up_proj.weight")
            assert not rows[:, WIDTH:].any()
            assert np.corrcoef(rows[3, :WIDTH].ravel(), weights.ravel())[0, 1] > 0.9


def test_every_matrix_is_in_the_results(refined: tuple[Path, Conversion, Result]) -> None:
    _, conversion, result = refined
    parts = {each.part: each for each in by_part(conversion.tensors, result.refined)}
    assert parts["ffn_down_exps"].matrices == 2 * EXPERTS
    assert parts["attn_q"].matrices == 3
    assert parts["output"].held_out is not None
    names = {tensor.spec.name for tensor in conversion.tensors if tensor.kind.name != "F32"}
    assert {each.tensor for each in result.refined} == names


def test_threads_change_no_bit(
    checkpoint: Path, calibrated: Path, tmp_path: Path, refined: tuple[Path, Conversion, Result]
) -> None:
    """Torch's own threads may change the last bits of large products; these are small."""
    prepare(checkpoint, calibrated).run(tmp_path / "out.gguf", threads=1)
    assert sha256(tmp_path / "out.gguf") == sha256(refined[0])


def test_refinement_needs_a_calibration_for_it(checkpoint: Path, calibrated: Path) -> None:
    with pytest.raises(UsageError, match="calibration"):
        Conversion.prepare(checkpoint, "Q2_K", refine=True)
    (path := calibrated / "refinement.safetensors").rename(path.with_suffix(".away"))
    try:
        with pytest.raises(Dots1Error, match=r"refinement\.safetensors.*calibrate --refine"):
            prepare(checkpoint, calibrated)
    finally:
        path.with_suffix(".away").rename(path)


def test_a_damaged_weight_is_named(calibrated: Path, tmp_path: Path) -> None:
    for name in ("lm_head.weight", "model.layers.1.mlp.experts.1.up_proj.weight"):
        source = small_checkpoint(tmp_path / name)
        folder = calibration_folder(source, tmp_path / f"{name}.calibrated")
        conversion = prepare(source, folder)
        spoil(source, name)
        with pytest.raises(CheckpointError, match="NaN"):
            conversion.run(tmp_path / "out.gguf", threads=2)


def spoil(source: Path, name: str) -> None:
    piece = Checkpoint.open(source).locate(name)
    with piece.file.open("r+b") as file:
        file.seek(piece.offset + 2 * 1000)
        file.write(b"\xc0\x7f")
