"""Gradients carried back a layer at a time: against autograd through the whole model at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dots1_local.reference.layers as layers_module
from dots1_local.calibrate.backward import generator, head_gradients
from dots1_local.errors import CheckpointError
from dots1_local.reference.layers import layer_forward, rms_norm
from dots1_local.reference.model import Compute, load_layer, load_layers, load_outer
from tests.calibrate.passes import Passed, back, forward, gradients
from tests.micro import micro_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Whole:
    """Autograd's answer: squares by layer and matrix, and the gradient at the embedding."""

    squares: dict[tuple[int, str], Tensor]
    g: Tensor


def whole_model(run: Passed, g: Tensor, monkeypatch: pytest.MonkeyPatch) -> Whole:
    """Through all layers at once, every product's output kept."""
    kept: dict[tuple[int, str], Tensor] = {}
    config, now = run.checkpoint.config, 0

    def linear(x: Tensor, weights: Mapping[str, Tensor], name: str, *_: object) -> Tensor:
        y = F.linear(x, weights[name])
        kept[now, name] = y
        return y

    entered = run.x[0].clone().requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(layers_module, "linear", linear)
        x = entered
        for now, weights in enumerate(load_layers(run.checkpoint)):
            x = layer_forward(x, weights, config, now)
    found = [
        torch.autograd.grad(x, [*kept.values(), entered], draw, retain_graph=True) for draw in g
    ]
    squares = {
        place: torch.stack([draw[i].flatten(0, -2).square().sum(0) for draw in found]).mean(0)
        for i, place in enumerate(kept)
    }
    return Whole(squares, torch.stack([draw[-1] for draw in found]))


def test_gradients_are_autograds(passed: Passed, monkeypatch: pytest.MonkeyPatch) -> None:
    g = gradients(passed)
    expected = whole_model(passed, g, monkeypatch)
    found: dict[tuple[int, str], Tensor] = {}
    for layer in reversed(range(passed.layers)):
        sums, _ = back(passed, g, layer)
        found |= {(layer, name): value for name, value in sums.items()}
    torch.testing.assert_close(g, expected.g, rtol=1e-3, atol=1e-3 * float(expected.g.std()))
    assert found.keys() == expected.squares.keys()
    for place, squares in expected.squares.items():
        assert found[place].dtype == torch.float64
        torch.testing.assert_close(
            found[place][0].float(), squares, rtol=2e-3, atol=1e-4 * float(squares.mean())
        )
        assert not found[place][1].any()


def test_bf16_is_nearly_the_same(passed: Passed) -> None:
    layer = passed.layers - 1
    exact, rounded = gradients(passed), gradients(passed)
    expected, _ = back(passed, exact, layer)
    found, _ = back(passed, rounded, layer, kernel=Compute(torch.device("cpu"), bf16=True))
    assert float((rounded - exact).norm() / exact.norm()) < 0.02
    for name in ("self_attn.q_proj.weight", "mlp.shared_experts.up_proj.weight"):
        torch.testing.assert_close(found[name].sum(), expected[name].sum(), rtol=0.03, atol=0)


def test_predicts_the_kl_divergence_of_small_noise(
    passed: Passed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise in what enters layer 2, against the logits computed with it and the same choices."""
    first, draws, noises = 2, 32, 8
    g, _ = head_gradients(
        passed.x[-1], passed.checkpoint, draws, generator(0, 5), torch.device("cpu")
    )
    for layer in reversed(range(first, passed.layers)):
        back(passed, g, layer)
    outer, config = load_outer(passed.checkpoint), passed.checkpoint.config
    layers = [load_layer(passed.checkpoint, layer) for layer in range(first, passed.layers)]
    choices: list[Tensor] = []

    def route(x: Tensor, weight: Tensor, bias: Tensor, _: object) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, weight).sigmoid()
        if len(choices) < len(layers):
            choices.append((scores + bias).topk(config.num_experts_per_tok).indices)
        else:
            choices.append(choices[-len(layers)])
        shares = scores.gather(-1, choices[-1])
        return choices[-1], config.routed_scaling_factor * shares / shares.sum(-1, keepdim=True)

    @torch.no_grad()
    def log_probabilities(x: Tensor) -> Tensor:
        for layer, weights in enumerate(layers, first):
            x = layer_forward(x, weights, config, layer)
        x = rms_norm(x, outer["model.norm.weight"], config.rms_norm_eps)
        return F.linear(x, outer["lm_head.weight"]).double().log_softmax(-1)

    monkeypatch.setattr(layers_module, "route", route)
    base = log_probabilities(passed.x[first])
    random = torch.Generator().manual_seed(3)
    measured = predicted = 0.0
    for _ in range(noises):
        noise = 0.01 * torch.randn(passed.x[first].shape, generator=random)
        changed = log_probabilities(passed.x[first] + noise)
        measured += float((base.exp() * (base - changed)).sum())
        predicted += float((g * noise).sum((1, 2, 3)).square().mean()) / 2
    assert predicted == pytest.approx(measured, rel=0.05)


def test_experts_without_tokens_have_no_gradient(tmp_path: Path) -> None:
    run = forward(micro_checkpoint(tmp_path), 1, 1)
    sums, _ = back(run, gradients(run), 1, sigma=0.01)
    reached = {name.split(".")[2] for name, v in sums.items() if ".experts." in name and v.any()}
    assert len(reached) == run.checkpoint.config.num_experts_per_tok
    assert sums["mlp.experts.0.up_proj.weight"].shape == (2, 32)


def test_infinite_gradients_name_the_layer(passed: Passed) -> None:
    g = gradients(passed)
    g[0, 0, 0, 0] = math.inf
    with pytest.raises(CheckpointError, match="layer 2"):
        back(passed, g, 2)
