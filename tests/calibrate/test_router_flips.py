"""Flips of routers: against real swaps, autograd of the margins, and a hand calculation."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dots1_local.reference.layers as layers_module
from dots1_local.calibrate.backward import generator
from dots1_local.calibrate.router_flips import RouterFlips, RouterNoise
from dots1_local.reference.layers import attention, moe, rms_norm
from dots1_local.reference.model import load_layer
from tests.calibrate.passes import CHUNKS, DRAWS, POSITIONS, Passed, back, forward, gradients
from tests.micro import micro_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def margins_of(run: Passed, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The FFN's inputs, the margins of their scores, and the margins with the bias."""
    weights, config = load_layer(run.checkpoint, layer), run.checkpoint.config
    eps, k = config.rms_norm_eps, config.num_experts_per_tok
    x = x + attention(rms_norm(x, weights["input_layernorm.weight"], eps), weights, config)
    rows = rms_norm(x, weights["post_attention_layernorm.weight"], eps)
    scores = F.linear(rows, weights["mlp.gate.weight"]).sigmoid().flatten(0, 1)
    biased = scores + weights["mlp.gate.e_score_correction_bias"]
    order = biased.argsort(descending=True)
    at = torch.arange(len(scores))
    last, following = order[:, k - 1], order[:, k]
    return (
        rows,
        scores[at, last] - scores[at, following],
        biased[at, last] - biased[at, following],
    )


def test_swap_kl_is_the_cost_of_real_swaps(passed: Passed, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, sigma, g = 3, 0.01, gradients(passed)
    rows, _, margins = margins_of(passed, layer, passed.x[layer])
    near = margins < margins.quantile(0.1)
    assert 0 < int(near.sum()) <= margins.numel() // 10

    def swapped(x: Tensor, weight: Tensor, bias: Tensor, config: object) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, weight).sigmoid()
        order = (scores + bias).argsort(descending=True)
        order[near, 3], order[near, 4] = order[near, 4], order[near, 3]
        shares = scores.gather(1, order[:, :4])
        return order[:, :4], 2.5 * shares / shares.sum(-1, keepdim=True)

    weights, config = load_layer(passed.checkpoint, layer), passed.checkpoint.config
    before = moe(rows, weights, config)
    with monkeypatch.context() as patch:
        patch.setattr(layers_module, "route", swapped)
        change = (moe(rows, weights, config) - before).flatten(0, 1)[near]
    expected = float((g.flatten(1, 2)[:, near] * change).sum(-1).square().mean()) / 2
    _, flips = back(passed, g, layer, sigma=sigma)
    assert flips.swap_kl == pytest.approx(expected, rel=1e-3)
    assert flips.density == pytest.approx(0.1 / float(margins.quantile(0.1)), rel=1e-3)
    swaps = flips.density * sigma / math.sqrt(2 * math.pi)  # of a token
    assert flips.rate * sigma**2 * 2 == pytest.approx(swaps * flips.swap_kl)


def test_tie_draws_get_gradients_of_the_margins(passed: Passed) -> None:
    layer, sigma = 3, 0.01
    g = torch.cat([gradients(passed), torch.zeros(2, *passed.x[0].shape)])
    alone = gradients(passed)
    sums, flips = back(passed, g, layer, kl_draws=DRAWS, sigma=sigma)
    expected_sums, _ = back(passed, alone, layer, sigma=sigma)
    torch.testing.assert_close(g[:DRAWS], alone)  # tie draws do not change kl draws
    torch.testing.assert_close(sums["self_attn.q_proj.weight"][0], expected_sums[
        "self_attn.q_proj.weight"][0])  # fmt: skip
    noise = torch.randn(4, CHUNKS * POSITIONS, generator=generator(0, layer))
    for draw in (2, 3):
        x = passed.x[layer].clone().requires_grad_()
        _, margins, _ = margins_of(passed, layer, x)
        total = (noise[draw] * math.sqrt(2 * flips.rate) * margins).sum()
        (expected,) = torch.autograd.grad(total, x)
        assert float(expected.norm()) > 0
        torch.testing.assert_close(g[draw], expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert sums["self_attn.q_proj.weight"][1].min() > 0
    assert not sums["mlp.shared_experts.down_proj.weight"][1].any()  # it comes after the margins


def test_dense_layers_and_margins_without_noise_have_no_flips(passed: Passed) -> None:
    g = torch.zeros(1, *passed.x[0].shape)
    for layer, sigma in ((0, 0.01), (1, 0.0)):
        _, flips = back(passed, g, layer, kl_draws=0, sigma=sigma)
        assert flips == RouterFlips()
        assert not g.any()


def test_nothing_flips_where_all_experts_are_chosen(tmp_path: Path) -> None:
    run = forward(micro_checkpoint(tmp_path, num_experts_per_tok=4))
    _, flips = back(run, gradients(run), 1, sigma=0.01)
    assert flips == RouterFlips()


def test_router_noise_by_hand() -> None:
    """Of 3 experts 1 is chosen; the identity is the router, so logits are the rows themselves.

    The first token's scores are 1/2, 3/4, 1/4, with the bias 1, 3/4, 1/4: experts 0 and 1 are next
    to each other. Their scores become 1/4 and 7/8: the margin changes by -1/4 - 1/8 = -3/8. The
    second token's are 1/4, 1/5, 7/8, with the bias 3/4, 1/5, 7/8: experts 2 and 0, which become
    9/10 and 1/4, by +1/40.
    """
    bias = torch.tensor([0.5, 0, 0])
    before = torch.tensor([[1 / 2, 3 / 4, 1 / 4], [1 / 4, 1 / 5, 7 / 8]]).logit()
    after = torch.tensor([[1 / 4, 7 / 8, 1 / 2], [1 / 4, 1 / 2, 9 / 10]]).logit()
    noise = RouterNoise(torch.eye(3), bias, chosen=1)
    noise.exact("mlp.gate.weight", before)
    noise.exact("self_attn.q_proj.weight", torch.ones(7, 3))
    for row in after.split(1):
        noise.rounded("mlp.gate.weight", row)
    expected = (3 / 8 + 1 / 40) / 2 * math.sqrt(math.pi / 2)
    assert noise.sigma() == pytest.approx(expected, rel=1e-5)


def test_router_without_choice_makes_no_noise() -> None:
    noise = RouterNoise(torch.eye(3), torch.zeros(3), chosen=3)
    noise.exact("mlp.gate.weight", torch.ones(2, 3))
    noise.rounded("mlp.gate.weight", torch.zeros(2, 3))
    assert noise.sigma() == 0
