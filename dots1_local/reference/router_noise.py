"""How far rounded weights move a router's margins: the density of near ties that they may swap."""

import math

import torch
from torch import Tensor

from dots1_local.reference.layers import router_scores

__all__ = ["RouterNoise"]


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
