"""Tokens for which a router's last choice was a close one, and what the other choice would cost.

Noise in what a router sees swaps the k-th expert with the next where their margin is smaller than
the noise: with a density p0 of margins around 0 (a share of all tokens per unit), noise of standard
deviation s swaps p0 s / sqrt(2 pi) of them. This is no quadratic form of the noise; `Ties.rate`
makes the one that equals it at a given s.

How far rounded weights move a router's margins: the density of near ties that they may swap.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dots1_local.architecture import Dots1Config
from dots1_local.reference.layers import expert_shares, router_scores

__all__ = [
    "RouterNoise",
    "Routing",
    "Ties",
    "margins",
]


_NEAR = 0.1  # of all tokens, those with the smallest margins


@dataclass(frozen=True)
class Ties:
    """What a layer's near ties are worth; all zero where there are none.

    `density` is the share of tokens per unit of margin, `swap_kl` the KL divergence, in nats, that
    comes of one swap, `rate` nats a token per unit of the variance of the margin.
    """

    density: float = 0.0
    swap_kl: float = 0.0
    rate: float = 0.0


@dataclass(frozen=True)
class Routing:
    """What a router with `bias` does with tokens to which it gives `scores` [tokens, experts]."""

    scores: Tensor
    bias: Tensor
    config: Dots1Config

    @cached_property
    def ranked(self) -> Tensor:
        """The experts chosen, best first, then the one that was next: [tokens, k + 1].

        Where all experts are always chosen there is no next one: [tokens, k].
        """
        most = min(self._k + 1, self.config.n_routed_experts)
        return (self.scores + self.bias).topk(most, dim=-1).indices

    @cached_property
    def shares(self) -> Tensor:
        """What the output of each of `ranked` is multiplied by: 0 for the next one."""
        shares = expert_shares(self.scores, self.ranked[:, : self._k], self.config)
        return F.pad(shares, (0, self.ranked.shape[1] - self._k))

    @cached_property
    def wanted(self) -> Tensor:
        """`ranked`, but -1 in place of a next expert that is no near tie."""
        wanted = self.ranked.clone()
        wanted[~self._near, self._k :] = -1
        return wanted

    def ties(self, dots: Tensor, sigma: float) -> Ties:
        """What near ties are worth if noise moves the margins by `sigma` (standard deviation).

        `dots` [draws, tokens, k + 1] are the products of the outputs of `wanted` with gradients g
        at the layer's output. These have the Hessian of KL divergence for a covariance, so that a
        change dy of that output costs the mean of (g dy)^2 / 2.
        """
        near, k = self._near, self._k
        if not (len(dots) and sigma > 0 and near.any()):
            return Ties()
        swapped = [*range(k - 1), k]
        after = expert_shares(self.scores[near], self.ranked[near][:, swapped], self.config)
        gained = (dots[:, near][..., swapped] * after).sum(-1)
        change = gained - (dots[:, near] * self.shares[near]).sum(-1)
        density, swap_kl = _NEAR / self._closest, float(change.square().mean()) / 2
        return Ties(density, swap_kl, density * swap_kl / (2 * sigma * math.sqrt(2 * math.pi)))

    @cached_property
    def _margins(self) -> Tensor:
        return margins(self.scores + self.bias, self.ranked, self.config)

    @cached_property
    def _closest(self) -> float:
        """The margin that a near tie is below."""
        return float(self._margins.quantile(_NEAR))

    @property
    def _near(self) -> Tensor:
        return self._margins < self._closest

    @property
    def _k(self) -> int:
        return self.config.num_experts_per_tok


def margins(scores: Tensor, ranked: Tensor, config: Dots1Config) -> Tensor:
    """By how much the last chosen expert's score leads the next one's; 0 if there is none."""
    last, following = ranked[:, config.num_experts_per_tok - 1], ranked[:, -1]
    return (scores.gather(-1, last[:, None]) - scores.gather(-1, following[:, None])).squeeze(-1)


class RouterNoise:
    """One router, and what reaches it of the same tokens through exact and through rounded weights.

    `exact` and `rounded` are observers: each hears all rows, in the same order, in any pieces.
    """

    def __init__(self, weight: Tensor, bias: Tensor, chosen: int) -> None:
        """`weight` [experts, hidden], `bias` [experts]; `chosen` experts a token."""
        self._weight, self._bias, self._chosen = weight, bias, chosen
        self._exact: list[Tensor] = []
        self._rounded: list[Tensor] = []

    def exact(self, name: str, rows: Tensor) -> None:
        """Hear the rows [rows, hidden] that reach the router through exact weights."""
        self._keep(self._exact, name, rows)

    def rounded(self, name: str, rows: Tensor) -> None:
        """Hear those of the same tokens that reach it through rounded weights."""
        self._keep(self._rounded, name, rows)

    def sigma(self) -> float:
        """The standard deviation of the change of the margin between the last expert chosen and
        the first one not chosen; 0 if all are.

        From the mean of its size, as if it were normal: its tails are heavier, and it is near
        ties, not tails, that this is for. The bias is in the choice and cancels in the change.
        """
        before, after = torch.cat(self._exact), torch.cat(self._rounded)
        if self._chosen == before.shape[1]:
            return 0.0
        bias = self._bias.to(before.device).float()
        ranked = (before + bias).topk(self._chosen + 1, dim=-1).indices
        change = (after - before).gather(-1, ranked[:, -2:]).double()
        return float((change[:, 0] - change[:, 1]).abs().mean()) * math.sqrt(math.pi / 2)

    def _keep(self, kept: list[Tensor], name: str, rows: Tensor) -> None:
        if name == "mlp.gate.weight":
            kept.append(router_scores(rows, self._weight.to(rows.device)))
