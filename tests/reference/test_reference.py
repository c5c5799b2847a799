"""The torch reference: against transformers, and against a router worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import Dots1ForCausalLM

from dots1_local.architecture import Dots1Config
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.reference.layers import moe, route
from dots1_local.reference.model import load_layer, logits
from tools.train_tiny import GEOMETRY

TEXT = "Once upon a time, there was a little dog. 话说天下大势，分久必合，合久必分。 He'll say 123!"


@pytest.fixture(scope="module")
def tokens(tiny: Path) -> torch.Tensor:
    ids = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(TEXT).ids
    return torch.tensor([ids, ids[::-1]])


def test_logits_are_those_of_transformers(tiny: Path, tokens: torch.Tensor) -> None:
    theirs = Dots1ForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(tokens).logits
    ours = logits(Checkpoint.open(tiny), tokens)
    assert (ours - expected).abs().max() < 1e-4


def test_every_matrix_is_observed(tiny: Path, tokens: torch.Tensor) -> None:
    """Calibration relies on seeing each matrix under its checkpoint name, with all its inputs."""
    checkpoint = Checkpoint.open(tiny)
    seen: dict[str, int] = {}

    def observe(name: str, rows: torch.Tensor) -> None:
        assert rows.shape[-1] == checkpoint.locate(name).shape[-1]
        seen[name] = len(rows)

    logits(checkpoint, tokens, observe)
    matrices = {n for n in checkpoint if n.startswith("model.layers.") and "norm" not in n}
    assert set(seen) == {n for n in matrices if "e_score" not in n}
    routed = sum(n for name, n in seen.items() if "layers.2.mlp.experts" in name and "up" in name)
    assert routed == tokens.numel() * checkpoint.config.num_experts_per_tok


def router() -> Dots1Config:
    return replace(GEOMETRY, n_routed_experts=4, num_experts_per_tok=2, routed_scaling_factor=2.5)


def test_router_bias_changes_the_choice_and_not_the_weights() -> None:
    """Scores are sigmoid(0, ln 3, -ln 3, ln 7) = 0.5, 0.75, 0.25, 0.875."""
    x = torch.tensor([[1.0]])
    weight = torch.tensor([[1.0], [3.0], [1 / 3], [7.0]]).log()
    config = router()
    chosen, shares = route(x, weight, torch.zeros(4), config)
    assert chosen.tolist() == [[3, 1]]
    torch.testing.assert_close(shares, 2.5 * torch.tensor([[0.875, 0.75]]) / 1.625)
    # 0.25 + 0.7 now leads 0.875; its weight is still 0.25's
    chosen, shares = route(x, weight, torch.tensor([0.0, 0.0, 0.7, 0.0]), config)
    assert chosen.tolist() == [[2, 3]]
    torch.testing.assert_close(shares, 2.5 * torch.tensor([[0.25, 0.875]]) / 1.125)


def test_router_without_normalisation() -> None:
    weight = torch.tensor([[1.0], [3.0], [1 / 3], [7.0]]).log()
    config = replace(router(), norm_topk_prob=False)
    _, shares = route(torch.tensor([[1.0]]), weight, torch.zeros(4), config)
    torch.testing.assert_close(shares, torch.tensor([[2.1875, 1.875]]))


def test_gradients_reach_every_expert(tiny: Path) -> None:
    """Training runs on the same functions."""
    checkpoint = Checkpoint.open(tiny)
    weights = {name: tensor.requires_grad_() for name, tensor in load_layer(checkpoint, 1).items()}
    rows = torch.randn(1, 512, checkpoint.config.hidden_size, generator=torch.manual_seed(0))
    moe(rows, weights, checkpoint.config).square().sum().backward()
    gradient = weights["mlp.experts.down_proj"].grad
    assert gradient is not None
    assert gradient.flatten(1).norm(dim=1).min() > 0


def test_config_of_the_example_is_the_trained_geometry(tiny: Path) -> None:
    raw = json.loads((tiny / "config.json").read_text())
    assert Dots1Config.from_json(raw) == GEOMETRY
