"""Shared by tests of the backward pass: a forward pass that saves every layer's inputs, and one
layer of the backward pass."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dots1_local.calibrate.backward import backward_layer, generator
from dots1_local.calibrate.router_flips import RouterFlips
from dots1_local.calibrate.weighted_errors import WeightedErrors
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.reference.layers import layer_forward
from dots1_local.reference.model import Compute, load_layers, load_outer

CPU = Compute(torch.device("cpu"))
CHUNKS, POSITIONS, DRAWS = 3, 40, 2


@dataclass(frozen=True)
class Passed:
    """The results of a forward pass: the inputs of all layers, and the output of the last one."""

    checkpoint: Checkpoint
    tokens: Tensor
    x: list[Tensor]

    @property
    def layers(self) -> int:
        return len(self.x) - 1


def forward(folder: Path, chunks: int = CHUNKS, positions: int = POSITIONS) -> Passed:
    checkpoint = Checkpoint.open(folder)
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, checkpoint.config.vocab_size, (chunks, positions), generator=random)
    x = [F.embedding(tokens, load_outer(checkpoint)["model.embed_tokens.weight"])]
    with torch.no_grad():
        for layer, weights in enumerate(load_layers(checkpoint)):
            x.append(layer_forward(x[-1], weights, checkpoint.config, layer))
    return Passed(checkpoint, tokens, x)


def back(
    run: Passed,
    g: Tensor,
    layer: int,
    *,
    kl_draws: int | None = None,
    sigma: float = 0.0,
    kernel: Compute = CPU,
    weighted: WeightedErrors | None = None,
) -> tuple[dict[str, Tensor], RouterFlips]:
    draws = len(g) if kl_draws is None else kl_draws
    random = generator(0, layer)
    observers = () if weighted is None else (weighted.observe, weighted.observe_squares)
    return backward_layer(
        g, run.x[layer], run.checkpoint, layer, draws, sigma, random, kernel, lambda tokens: None,
        *observers,
    )  # fmt: skip


def gradients(run: Passed, draws: int = DRAWS, seed: int = 2) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(draws, *run.x[0].shape, generator=random)
