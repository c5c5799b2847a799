"""The model layer by layer: segments with rounded weights beside others, and their divergence."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from dots1_local.calibrate.rounded_divergence import rounded_divergence
from dots1_local.calibrate.router_flips import RouterNoise
from dots1_local.calibrate.stream import Segment, embed, forward_layer, rounding_to
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.ggml import TYPES
from dots1_local.reference.layers import layer_forward
from dots1_local.reference.model import Compute, forward, load_layers, load_outer
from tests.micro import micro_checkpoint

Weights = dict[str, torch.Tensor]
CPU = torch.device("cpu")
LAYERS = 3
Q4_0 = rounding_to(TYPES["Q4_0"], threads=1)


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("micro")
    return Checkpoint.open(micro_checkpoint(folder, num_hidden_layers=LAYERS))


def unchanged(weights: Weights) -> Weights:
    return weights


def rounded(weights: Weights) -> Weights:
    """All matrices except the router's, stored in Q4_0 by gguf-py and decoded."""

    def stored(tensor: torch.Tensor) -> torch.Tensor:
        kind = gguf.GGMLQuantizationType.Q4_0
        return torch.from_numpy(dequantize(quantize(tensor.numpy(), kind), kind))

    return {
        name: tensor if "norm" in name or "mlp.gate." in name else stored(tensor)
        for name, tensor in weights.items()
    }


def random_tokens(chunks: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 288, (chunks, 20), generator=torch.Generator().manual_seed(seed))


def streamed(checkpoint: Checkpoint, tokens: torch.Tensor, *segments: Segment) -> torch.Tensor:
    """The output of the last layer."""
    x = torch.empty(*tokens.shape, checkpoint.config.hidden_size)
    for segment in segments:
        part = slice(segment.start, segment.stop)
        embed(checkpoint, tokens[part], x[part], segment.rounding)
    for layer in range(LAYERS):
        forward_layer(x, checkpoint, layer, segments, Compute(CPU), lambda _: None)
    return x


def whole(checkpoint: Checkpoint, tokens: torch.Tensor, *, is_rounded: bool) -> torch.Tensor:
    """The same, computed from whole layers."""
    change = rounded if is_rounded else unchanged
    outer, layers = change(load_outer(checkpoint)), map(change, load_layers(checkpoint))
    x = outer["model.embed_tokens.weight"][tokens]
    for layer, weights in enumerate(layers):
        x = layer_forward(x, weights, checkpoint.config, layer)
    return x


def test_rounding_affects_only_its_segment(micro: Checkpoint) -> None:
    tokens = random_tokens(5)
    x = streamed(micro, tokens, Segment(0, 2), Segment(2, 4, rounding=Q4_0), Segment(4, 5))
    for part, is_rounded in ((slice(2), False), (slice(2, 4), True), (slice(4, 5), False)):
        expected = whole(micro, tokens[part], is_rounded=is_rounded)
        torch.testing.assert_close(x[part], expected, atol=1e-5, rtol=1e-5)


def test_a_rounded_segment_changes_no_bit_of_others(micro: Checkpoint) -> None:
    tokens = random_tokens(4)
    alone = streamed(micro, tokens[:2], Segment(0, 2))
    x = streamed(micro, tokens, Segment(0, 2), Segment(2, 4, rounding=Q4_0))
    assert torch.equal(x[:2], alone)


def test_rows_that_blocks_do_not_fit_stay_unchanged() -> None:
    matrix = torch.randn(3, 48, dtype=torch.bfloat16)
    assert Q4_0(matrix) is matrix


def test_large_matrices_are_rounded_like_small_ones() -> None:
    matrix = torch.randn(700, 4096)
    np.testing.assert_array_equal(Q4_0(matrix)[690:], Q4_0(matrix[690:]))


@pytest.mark.parametrize("tied", [False, True])
def test_divergence_equals_that_of_the_whole_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """Blocks of 100 tokens of a vocabulary of 288, and of 7 of 40 positions."""
    path = micro_checkpoint(tmp_path, num_hidden_layers=LAYERS, tie_word_embeddings=tied)
    checkpoint, tokens = Checkpoint.open(path), random_tokens(2)
    log_p, log_q = (
        forward(tokens, change(load_outer(checkpoint)), map(change, load_layers(checkpoint)),
                checkpoint.config).double().log_softmax(-1)
        for change in (unchanged, rounded)
    )  # fmt: skip
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    monkeypatch.setattr("dots1_local.calibrate.rounded_divergence._VOCABULARY", 100)
    monkeypatch.setattr("dots1_local.calibrate.rounded_divergence._ROWS", 7)
    x = streamed(checkpoint, tokens.repeat(2, 1), Segment(0, 2), Segment(2, 4, rounding=Q4_0))
    measured = rounded_divergence(x[:2], x[2:], checkpoint, Q4_0, CPU)
    assert measured == pytest.approx(expected, rel=1e-4)
    assert rounded_divergence(x[:2], x[:2], checkpoint, lambda rows: rows, CPU) == 0


def test_observers_get_the_rows_of_their_segment(micro: Checkpoint) -> None:
    """With the same weights there is no noise; with rounded ones there is some."""
    tokens = random_tokens(2).repeat(2, 1)
    x = torch.empty(*tokens.shape, micro.config.hidden_size)
    for rounding, quiet in ((None, True), (Q4_0, False)):
        embed(micro, tokens, x)
        weight, bias = (
            torch.from_numpy(micro.read(f"model.layers.1.mlp.gate.{name}"))
            for name in ("weight", "e_score_correction_bias")
        )
        noise = RouterNoise(weight, bias, micro.config.num_experts_per_tok)
        segments = Segment(0, 2, noise.exact), Segment(2, 4, noise.rounded, rounding)
        forward_layer(x, micro, 1, segments, Compute(CPU), lambda _: None)
        assert (noise.sigma() == 0) is quiet
