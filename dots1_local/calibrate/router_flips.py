"""Tokens whose router would choose another expert, and what that would cost.

Noise in a router's input swaps the last chosen expert with the next one where the margin between
their scores is smaller than the noise. If the density of margins around 0 is p0 (part of all
tokens per unit), noise of standard deviation s swaps p0 s / sqrt(2 pi) of all tokens. This is not
quadratic in the noise; `RouterFlips.rate` is that of the quadratic form which equals it at a
given s.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dots1_local.architecture import Dots1Config
from dots1_local.reference.layers import expert_shares, router_scores

__all__ = ["RouterFlips", "RouterNoise", "Routing", "margins"]

_NEAR = 0.1  # part of all tokens that counts as nearly tied: those with the smallest margins


@dataclass(frozen=True)
class RouterFlips:
    """The expected cost of the flips of one router; all 0 if it cannot flip.

    `density` is the part of all tokens per unit of margin around 0, `swap_kl` the KL divergence of
    one swap, in nats, and `rate` is in nats a token per unit of the margin's variance.
    """

    density: float = 0.0
    swap_kl: float = 0.0
    rate: float = 0.0


@dataclass(frozen=True)
class Routing:
    """The choices of a router with `bias`, for tokens with `scores` [tokens, experts]."""

    scores: Tensor
    bias: Tensor
    config: Dots1Config

    @cached_property
    def ranked(self) -> Tensor:
        """The chosen experts, best first, and the next one: [tokens, k + 1].

        If every expert is always chosen there is no next one: [tokens, k].
        """
        most = min(self._k + 1, self.config.n_routed_experts)
        return (self.scores + self.bias).topk(most, dim=-1).indices

    @cached_property
    def shares(self) -> Tensor:
        """The factor of the output of each expert in `ranked`: 0 for the next one."""
        shares = expert_shares(self.scores, self.ranked[:, : self._k], self.config)
        return F.pad(shares, (0, self.ranked.shape[1] - self._k))

    @cached_property
    def wanted(self) -> Tensor:
        """`ranked`, with -1 for a next expert that is not nearly tied."""
        wanted = self.ranked.clone()
        wanted[~self._near, self._k :] = -1
        return wanted

    def flips(self, dots: Tensor, sigma: float) -> RouterFlips:
        """The cost of flips if noise of standard deviation `sigma` is added to the margins.

        `dots` [draws, tokens, k + 1] are the products of the outputs of `wanted` with gradients g
        at the layer's output. The covariance of g is the Hessian of the KL divergence, so a change
        dy of that output costs the mean of (g dy)^2 / 2.
        """
        near, k = self._near, self._k
        if not (len(dots) and sigma > 0 and near.any()):
            return RouterFlips()
        swapped = [*range(k - 1), k]
        after = expert_shares(self.scores[near], self.ranked[near][:, swapped], self.config)
        gained = (dots[:, near][..., swapped] * after).sum(-1)
        change = gained - (dots[:, near] * self.shares[near]).sum(-1)
        density, swap_kl = _NEAR / self._threshold, float(change.square().mean()) / 2
        return RouterFlips(
            density, swap_kl, density * swap_kl / (2 * sigma * math.sqrt(2 * math.pi))
        )

    @cached_property
    def _margins(self) -> Tensor:
        return margins(self.scores + self.bias, self.ranked, self.config)

    @cached_property
    def _threshold(self) -> float:
        """The margin below which a token counts as nearly tied."""
        return float(self._margins.quantile(_NEAR))

    @property
    def _near(self) -> Tensor:
        return self._margins < self._threshold

    @property
    def _k(self) -> int:
        return self.config.num_experts_per_tok


def margins(scores: Tensor, ranked: Tensor, config: Dots1Config) -> Tensor:
    """The last chosen expert's score minus the next one's; 0 if there is no next one."""
    last, following = ranked[:, config.num_experts_per_tok - 1], ranked[:, -1]
    return (scores.gather(-1, last[:, None]) - scores.gather(-1, following[:, None])).squeeze(-1)


class RouterNoise:
    """How far rounding all weights moves the margins of one router.

    `exact` and `rounded` are observers for the same tokens, computed with exact and with rounded
    weights. Both get all rows in the same order, in pieces of any size.
    """

    def __init__(self, weight: Tensor, bias: Tensor, chosen: int) -> None:
        """`weight` [experts, hidden], `bias` [experts]; `chosen` is the experts per token."""
        self._weight, self._bias, self._chosen = weight, bias, chosen
        self._exact: list[Tensor] = []
        self._rounded: list[Tensor] = []

    def exact(self, name: str, rows: Tensor) -> None:
        """Take the router's inputs [rows, hidden] that were computed with exact weights."""
        self._add(self._exact, name, rows)

    def rounded(self, name: str, rows: Tensor) -> None:
        """Take the router's inputs [rows, hidden] that were computed with rounded weights."""
        self._add(self._rounded, name, rows)

    def sigma(self) -> float:
        """The standard deviation of the change in the margin between the last chosen expert and
        the next one; 0 if all experts are chosen.

        It is derived from the mean absolute change as if that were normally distributed. The real
        tails are heavier, but near ties depend on the middle, not on the tails. The bias affects
        which experts are compared, and cancels in the change.
        """
        before, after = torch.cat(self._exact), torch.cat(self._rounded)
        if self._chosen == before.shape[1]:
            return 0.0
        bias = self._bias.to(before.device).float()
        ranked = (before + bias).topk(self._chosen + 1, dim=-1).indices
        change = (after - before).gather(-1, ranked[:, -2:]).double()
        return float((change[:, 0] - change[:, 1]).abs().mean()) * math.sqrt(math.pi / 2)

    def _add(self, scores: list[Tensor], name: str, rows: Tensor) -> None:
        if name == "mlp.gate.weight":
            scores.append(router_scores(rows, self._weight.to(rows.device)))
