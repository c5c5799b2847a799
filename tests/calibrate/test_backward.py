"""The backward pass: against autograd through the whole model, and the Hessian of KL divergence."""

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
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.reference.layers import layer_forward, rms_norm
from dots1_local.reference.model import Compute, load_layer, load_layers, load_outer, logits
from tests.calibrate.passes import Passed, back, forward, gradients
from tests.micro import micro_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Whole:
    """Autograd's results: squares by layer and matrix, and the gradient at the embedding."""

    squares: dict[tuple[int, str], Tensor]
    g: Tensor


def whole_model(run: Passed, g: Tensor, monkeypatch: pytest.MonkeyPatch) -> Whole:
    """Gradients through all layers at once, with every product's output."""
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


def test_gradients_equal_autograds(passed: Passed, monkeypatch: pytest.MonkeyPatch) -> None:
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
    """Noise in the input of layer 2, against logits computed with it and the same experts."""
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


@pytest.mark.parametrize("tied", [False, True])
def test_logit_gradients_have_the_hessian_of_kl_for_a_covariance(
    tmp_path: Path, tied: bool
) -> None:
    run = forward(micro_checkpoint(tmp_path, tie_word_embeddings=tied), 1, 3)
    p = logits(run.checkpoint, run.tokens)[0].double().softmax(-1)
    draws = 2000
    g, squares = head_gradients(
        run.x[-1], run.checkpoint, draws, generator(0, 2), torch.device("cpu")
    )
    assert g.shape == (draws, 1, 3, 64)
    torch.testing.assert_close(squares, (p * (1 - p)).sum(0), rtol=1e-5, atol=1e-9)
    outer = load_outer(run.checkpoint)
    head = outer["model.embed_tokens.weight" if tied else "lm_head.weight"]

    def last(x: Tensor) -> Tensor:
        normed = rms_norm(x, outer["model.norm.weight"], run.checkpoint.config.rms_norm_eps)
        return F.linear(normed, head)

    for position in range(3):
        jacobian = torch.func.jacrev(last)(run.x[-1][0, position]).double()
        q = p[position]
        expected = jacobian.T @ (q.diag() - q.outer(q)) @ jacobian
        drawn = g[:, 0, position].double()
        found = drawn.T @ drawn / draws
        assert float(found.trace()) == pytest.approx(float(expected.trace()), rel=0.05)
        assert float((found - expected).norm() / expected.norm()) < 0.3
    crossed = g[:, 0, 0].T @ g[:, 0, 1] / draws  # tokens are independent of each other
    assert float(crossed.norm()) < 0.3 * float(expected.norm())


def test_head_of_three_words(tmp_path: Path) -> None:
    """p = 1/2, 1/3, 1/6: p (1 - p) = 1/4, 2/9, 5/36 for each of two tokens."""
    run = forward(micro_checkpoint(tmp_path), 1, 2)
    rows = torch.zeros(run.checkpoint.config.vocab_size, 64)
    normed = torch.nn.functional.one_hot(torch.tensor(0), 64) * 8.0
    rows[:, 0] = -100 / 8
    rows[:3, 0] = torch.tensor([3.0, 2.0, 1.0]).log() / 8

    def replaced(checkpoint: Checkpoint, name: str) -> Tensor:
        return rows if name == "lm_head.weight" else torch.ones(64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dots1_local.calibrate.backward.read_tensor", replaced)
        x = normed.expand(1, 2, 64).contiguous()
        _, squares = head_gradients(x, run.checkpoint, 1, generator(0, 0), torch.device("cpu"))
    expected = 2 * torch.tensor([1 / 4, 2 / 9, 5 / 36], dtype=torch.float64)
    torch.testing.assert_close(squares[:3], expected, rtol=1e-4, atol=0)
    assert float(squares[3:].sum()) < 1e-9


def test_each_layer_has_random_numbers_of_its_own() -> None:
    def first(seed: int, layer: int) -> float:
        return float(torch.randn(1, generator=generator(seed, layer)))

    assert first(0, 3) == first(0, 3)
    assert len({first(0, 3), first(0, 4), first(1, 3)}) == 3
