"""dots1-tiny's parameters and one training step, in one or several processes.

On a CPU each process computes its part of every batch on one thread, and waits for the others once
per step. On a busy machine this loses far less time than threads that wait at every matrix. Each
process writes gradients, losses and expert counts to its own row of shared memory; then all make
the same update.
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
from dots1_local.reference.layers import Observer
from dots1_local.reference.model import forward, stacked_name

__all__ = ["BIAS", "Model", "Team", "count_experts", "new_model", "shared_rows", "step"]

BIAS = "e_score_correction_bias"
_DOWN = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.down_proj")


@dataclass(frozen=True)
class Model:
    """Parameters under their full names; experts are stacked as in `dots1_local.reference`."""

    config: Dots1Config
    tensors: dict[str, Tensor]

    @property
    def trained(self) -> list[Tensor]:
        """The parameters with gradients: all but the router's bias, which follows the load."""
        return [tensor for name, tensor in self.tensors.items() if BIAS not in name]

    @property
    def layers(self) -> list[dict[str, Tensor]]:
        """The parameters of each layer, under their names relative to it."""
        prefixes = [f"model.layers.{layer}." for layer in range(self.config.num_hidden_layers)]
        return [
            {n.removeprefix(p): t for n, t in self.tensors.items() if n.startswith(p)}
            for p in prefixes
        ]

    @property
    def device(self) -> torch.device:
        return self.tensors["model.norm.weight"].device

    def loss(self, rows: Tensor, observe: Observer | None = None) -> Tensor:
        """Mean cross-entropy, in nats, of `rows` [batch, length + 1]."""
        rows = rows.to(self.device)
        with _bf16(self.device):
            logits = forward(rows[:, :-1], self.tensors, self.layers, self.config, observe)
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def _bf16(device: torch.device) -> torch.autocast | nullcontext[None]:
    """bf16 if the hardware multiplies it faster than F32; otherwise it would be far slower."""
    if device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def new_model(config: Dots1Config, seed: int, device: str = "cpu") -> Model:
    """Normal weights of deviation 0.02; less for matrices that write to the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in inventory(config):
        name = stacked_name(spec)
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


def count_experts(counts: Tensor) -> Observer:
    """An observer that adds the rows of each routed expert to `counts` [layers, experts]."""

    def observe(name: str, rows: Tensor) -> None:
        if found := _DOWN.match(name):
            counts[int(found[1]), int(found[2])] += len(rows)

    return observe


@dataclass(frozen=True)
class Team:
    """The processes that train together, with their shared memory and barrier."""

    size: int = 1
    rank: int = 0
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    barrier: Barrier | None = None

    def average(self, parts: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the processes."""
        if self.barrier is None:
            return
        torch.cat([part.flatten() for part in parts], out=self.rows[self.rank])
        self.barrier.wait()
        mean = self.rows.mean(0)
        self.barrier.wait()  # now all have read all rows, and may overwrite their own
        for part, piece in zip(parts, mean.split([p.numel() for p in parts]), strict=True):
            part.copy_(piece.view_as(part))


def shared_rows(config: Dots1Config, size: int) -> Tensor:
    """Shared memory for the gradients, counts and loss of each of `size` processes."""
    gradients = sum(tensor.numel() for tensor in new_model(config, 0).trained)
    counts = config.num_hidden_layers * config.n_routed_experts
    rows = torch.empty(size, gradients + counts + 1)
    rows.share_memory_()
    return rows


def step(
    model: Model, optimizer: torch.optim.Optimizer, rows: Tensor, bias_rate: float, team: Team
) -> float:
    """Make one update from `rows` [batch, length + 1]; return the loss before it."""
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.n_routed_experts)
    loss = model.loss(rows[team.rank :: team.size], count_experts(counts))
    loss.backward()
    total = loss.detach().cpu().reshape(1)
    with torch.no_grad():
        gradients = [tensor.grad for tensor in model.trained if tensor.grad is not None]
        team.average([*gradients, counts, total])
        torch.nn.utils.clip_grad_norm_(model.trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _balance(model, counts, bias_rate)
    return float(total)


def _balance(model: Model, counts: Tensor, rate: float) -> None:
    """Balance load without an auxiliary loss (DeepSeek-V3): raise the bias of experts that got less
    than their share of this batch by `rate`, and lower that of the others."""
    for layer in range(model.config.first_k_dense_replace, model.config.num_hidden_layers):
        bias = model.tensors[f"model.layers.{layer}.mlp.gate.{BIAS}"]
        load = counts[layer].to(bias.device)
        bias += rate * (load.mean() - load).sign()
