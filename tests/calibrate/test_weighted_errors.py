"""The errors of refined rows, weighted by the gradients of the same tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dots1_local.architecture import TensorSpec, inventory
from dots1_local.calibrate.calibrate import calibrate
from dots1_local.calibrate.output_errors import candidates
from dots1_local.calibrate.refined_errors import ErrorRows
from dots1_local.calibrate.weighted_errors import WeightedErrors
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.ggml import TYPES, QuantType
from dots1_local.quant.encode import decode, encode
from dots1_local.quant.sensitivity import load_sensitivity
from dots1_local.reference.layers import layer_forward, route
from dots1_local.reference.model import load_layer
from dots1_local.refine.matrix import refine_matrix
from dots1_local.refine.metric import Metric, input_metric
from tests.calibrate.passes import Passed, back, forward, gradients
from tests.calibrate.test_refined_sensitivity import inputs_of
from tests.micro import micro_checkpoint

LAYER, PREFIX = 1, "model.layers.1."
Floats = np.ndarray


def random_errors(spec: TensorSpec) -> dict[str, ErrorRows]:
    """Refined errors are in three columns only."""
    random = np.random.default_rng(5)
    found = {}
    for source in spec.sources:
        numbers = np.sort(random.choice(spec.source_shape[0], 20, replace=False))
        errors = random.standard_normal((2, 20, spec.source_shape[1]), np.float32)
        errors[0, :, 3:] = 0
        chances = random.uniform(0.2, 1, 20)
        found[source] = ErrorRows(numbers, chances, errors)
    return found


def inputs_and_shares(run: Passed, name: str) -> list[tuple[Floats, Floats]]:
    """For each matrix of the tensor, its inputs, and each token's factor of its output (0 if the
    token is not routed to it)."""
    weights, config = load_layer(run.checkpoint, LAYER), run.checkpoint.config
    seen: dict[str, torch.Tensor] = {}
    layer_forward(run.x[LAYER], weights, config, LAYER, seen.__setitem__)
    if name.endswith("_shexp.weight"):
        rows = seen["mlp.shared_experts.down_proj.weight"]
        return [(rows.numpy(), np.ones(len(rows), np.float32))]
    bias = weights["mlp.gate.e_score_correction_bias"]
    chosen, shares = route(seen["mlp.gate.weight"], weights["mlp.gate.weight"], bias, config)
    found = []
    for expert in range(config.n_routed_experts):
        share = (shares * (chosen == expert)).sum(-1).numpy()
        inputs = np.zeros((len(share), config.moe_intermediate_size), np.float32)
        inputs[share > 0] = seen[f"mlp.experts.{expert}.down_proj.weight"].numpy()
        found.append((inputs, share))
    return found


@pytest.mark.parametrize("name", ["blk.1.ffn_down_shexp.weight", "blk.1.ffn_down_exps.weight"])
def test_the_factor_is_the_mean_of_products_by_the_product_of_means(
    tmp_path: Path, name: str
) -> None:
    """The gradient at the output of down is that of the layer times the token's share."""
    run = forward(micro_checkpoint(tmp_path), 2, 40)
    spec = next(spec for spec in inventory(run.checkpoint.config) if spec.name == name)
    rows, g = random_errors(spec), gradients(run)
    g[0, 0, :4] *= 20  # a `kl` and a `tie` draw
    at_outputs = g.flatten(1, 2).numpy().copy()
    weighted = WeightedErrors(rows, PREFIX)
    with torch.no_grad():
        matrices = inputs_and_shares(run, name)
    back(run, g, LAYER, kl_draws=1, sigma=0.01, weighted=weighted)
    expected = []
    for gradient in at_outputs:
        products, means = np.zeros(2), np.zeros(2)
        for source, (inputs, share) in zip(spec.sources, matrices, strict=True):
            routed = share > 0
            squares = np.square((gradient * share[:, None])[routed][:, rows[source].numbers])
            squares /= rows[source].chances
            for which, error in enumerate(rows[source].errors):
                costs = np.square(inputs[routed] @ error.T)
                products[which] += (squares * costs).sum()
                means[which] += (squares.sum(0) * costs.mean(0)).sum()
        excess = products / means
        expected.append(excess[0] / excess[1])
    assert weighted.factors(spec) == pytest.approx(expected, rel=1e-3)
    assert abs(expected[0] - 1) > 0.1


def test_without_gradients_nothing_is_weighted(tmp_path: Path) -> None:
    run = forward(micro_checkpoint(tmp_path), 1, 8)
    specs = inventory(run.checkpoint.config)
    spec = next(spec for spec in specs if spec.name == "blk.1.ffn_down_exps.weight")
    weighted = WeightedErrors(random_errors(spec), PREFIX)
    assert weighted.factors(spec) == (1, 1)
    back(run, 0 * gradients(run), LAYER, kl_draws=1, weighted=weighted)
    assert weighted.factors(spec) == (1, 1)


@pytest.fixture(scope="module")
def mostly_certain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model that is certain of what follows, except after words from number 190 on.

    These have another direction of the residual stream, so that refinement neglects it.
    """
    folder = micro_checkpoint(
        tmp_path_factory.mktemp("certain"), hidden_size=256, moe_intermediate_size=64
    )
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    scale = float(embedding.float().std())
    embedding[:190, 0] = 20 * scale
    embedding[190:, 128:] *= 3
    embedding[:190, 128:] *= 0.3
    head[0, 0] = 400 * head.float().std()
    save_file(tensors, file)
    return Checkpoint.open(folder)


def test_damage_approaches_that_of_the_tokens_with_gradients(
    mostly_certain: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a whole matrix refined by hand, on all tokens and on uncertain ones; other tokens
    have small gradients, too."""

    def fewer(spec: TensorSpec, importance: bool) -> list[QuantType]:
        return [k for k in candidates(spec, importance) if k.name in ("Q3_K", "IQ4_NL")]

    monkeypatch.setattr("dots1_local.calibrate.refined_rows.candidates", fewer)  # is faster
    tokens = np.random.default_rng(0).integers(0, 200, (48, 128)).astype(np.int32)
    calibrate(mostly_certain, tmp_path / "out", tokens, refine=True, threads=1)
    plain, refined = (
        load_sensitivity(tmp_path / "out" / file).tensors["blk.1.ffn_up_shexp.weight"]
        for file in ("sensitivity.json", "sensitivity-refined.json")
    )
    kind, source = TYPES["Q3_K"], "model.layers.1.mlp.shared_experts.up_proj.weight"
    weights, rows = mostly_certain.read(source), inputs_of(mostly_certain, tokens, source)
    moment = rows.T @ rows / np.float32(len(rows))
    data = refine_matrix(
        weights, kind, Metric(input_metric(moment, len(rows))), None, columns=rows.shape[1]
    ).data
    importance = np.diag(moment).copy()
    errors = [
        decode(each, kind, rows.shape[1]) - weights
        for each in (data, encode(weights, kind, importance))
    ]
    everywhere, uncertain = (
        [np.square(some @ error.T).sum() for error in errors]
        for some in (rows, rows[tokens.ravel() >= 190])
    )
    found = refined["Q3_K"].error / plain["Q3_K"].error
    assert 1.3 * everywhere[0] / everywhere[1] < found < 1.1 * uncertain[0] / uncertain[1]
