"""dots1-tiny's parameters and one training step, in one process or several.

Each process computes its share of every batch on one thread and meets the others once a step:
on a busy machine that loses far less than threads that meet at every matrix. Gradients, losses
and expert counts travel in one shared row per process; all then make the same update.
"""

import math
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from threading import Barrier

import torch
import torch.nn.functional as F
from torch import Tensor

from dots1_local.architecture import Dots1Config, inventory
from dots1_local.reference import Observer, forward

__all__ = [
    "BIAS",
    "Model",
    "Team",
    "count_experts",
    "new_model",
    "parameter_count",
    "shared_rows",
    "step",
]

BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Model:
    """Parameters under their full names (experts stacked), and the same tensors layer by layer."""

    config: Dots1Config
    tensors: dict[str, Tensor]

    @property
    def trained(self) -> list[Tensor]:
        """All that gradients move; the router bias moves by load instead."""
        return [tensor for name, tensor in self.tensors.items() if BIAS not in name]

    @property
    def layers(self) -> list[dict[str, Tensor]]:
        prefixes = [f"model.layers.{layer}." for layer in range(self.config.num_hidden_layers)]
        return [
            {n.removeprefix(p): t for n, t in self.tensors.items() if n.startswith(p)}
            for p in prefixes
        ]

    def logits(self, tokens: Tensor, observe: Observer | None = None) -> Tensor:
        return forward(tokens, self.tensors, self.layers, self.config, observe)

    def loss(self, rows: Tensor, observe: Observer | None = None) -> Tensor:
        """Mean cross-entropy, in nats, of rows [batch, length + 1]."""
        device = rows.device.type
        with torch.autocast(device, torch.bfloat16) if _fast_bf16(device) else nullcontext():
            logits = self.logits(rows[:, :-1], observe)
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def _fast_bf16(device: str) -> bool:
    return device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def new_model(config: Dots1Config, seed: int, device: str = "cpu") -> Model:
    """Normal weights of deviation 0.02, smaller where a matrix writes to the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in inventory(config):
        name = spec.sources[0]
        if spec.role == "routed":
            name = name.replace("experts.0.", "experts.").removesuffix(".weight")
        if spec.role == "norm":
            tensor = torch.ones(spec.shape)
        elif BIAS in name:
            tensor = torch.zeros(spec.shape)
        else:
            writes = "o_proj" in name or "down_proj" in name
            deviation = 0.02 / (math.sqrt(2 * config.num_hidden_layers) if writes else 1)
            tensor = torch.randn(spec.shape, generator=generator) * deviation
        tensors[name] = tensor.to(device).requires_grad_(BIAS not in name)
    return Model(config, tensors)


def parameter_count(model: Model) -> int:
    return sum(tensor.numel() for tensor in model.tensors.values())


def shared_rows(config: Dots1Config, size: int) -> Tensor:
    """Memory for a team of `size`: room for gradients, counts and the loss of each."""
    gradients = sum(tensor.numel() for tensor in new_model(config, 0).trained)
    return torch.empty(
        size, gradients + config.num_hidden_layers * config.n_routed_experts + 1
    ).share_memory_()


def count_experts(config: Dots1Config, counts: Tensor) -> Observer:
    """Adds the rows that each routed expert receives to `counts` [layers, experts]."""
    down = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.down_proj")

    def observe(name: str, rows: Tensor) -> None:
        if found := down.match(name):
            counts[int(found[1]), int(found[2])] += len(rows)

    return observe


@dataclass(frozen=True)
class Team:
    """The processes that train together, and what they share."""

    size: int = 1
    rank: int = 0
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    barrier: Barrier | None = None

    def mean(self, parts: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the processes."""
        if self.barrier is None:
            return
        torch.cat([part.flatten() for part in parts], out=self.rows[self.rank])
        self.barrier.wait()
        mean = self.rows.mean(0)
        self.barrier.wait()
        for part, piece in zip(parts, mean.split([p.numel() for p in parts]), strict=True):
            part.copy_(piece.view_as(part))


def step(
    model: Model, optimizer: torch.optim.Optimizer, rows: Tensor, bias_rate: float, team: Team
) -> tuple[float, Tensor]:
    """One update from `rows` [batch, length + 1]; returns the loss and [layers, experts] counts.

    Load is balanced without an auxiliary loss (DeepSeek-V3): an expert that got less than its
    share of this batch has its bias raised by `bias_rate`, one that got more has it lowered.
    """
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.n_routed_experts)
    loss = model.loss(rows[team.rank :: team.size], count_experts(config, counts))
    loss.backward()  # type: ignore[no-untyped-call]
    for tensor in model.trained:
        if tensor.grad is None:  # an expert layer that no row reached
            tensor.grad = torch.zeros_like(tensor)
    total = loss.detach().cpu().reshape(1)
    with torch.no_grad():
        team.mean([*(t.grad for t in model.trained if t.grad is not None), counts, total])
        torch.nn.utils.clip_grad_norm_(model.trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
            bias = model.tensors[f"model.layers.{layer}.mlp.gate.{BIAS}"]
            load = counts[layer].to(bias.device)
            bias += bias_rate * (load.mean() - load).sign()
    return float(total), counts
