"""Gradients at the logits: their covariance is the Hessian of KL divergence."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dots1_local.calibrate.backward import generator, head_gradients
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.reference.layers import rms_norm
from dots1_local.reference.model import load_outer, logits
from tests.calibrate.passes import forward
from tests.micro import micro_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


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
