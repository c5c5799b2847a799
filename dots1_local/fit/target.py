"""The best choice of types and places beside one placement, as `Costs` models it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from dots1_local.fit.costs import Costs
from dots1_local.quant.choices import Choice, Choices
from dots1_local.quant.limits import Options, Pick, least_loss

__all__ = ["TANGENTS", "Target", "best_pick", "choice_of_size", "loss_of"]

# The square root of flips is mostly the same after three tangents, which then gain this little.
TANGENTS, _GAIN = 6, 0.003


@dataclass(frozen=True)
class Target:
    """Limits besides the machine's memory: bytes of tensors, seconds of a token and of the turn,
    and nats a token. Without `kl`, the KL divergence is least; with it, the turn's time."""

    nbytes: float | None = None
    decode: float | None = None
    turn: float | None = None
    kl: float | None = None

    def rank(self, kl: float, turn: float) -> tuple[float, float]:
        """The lowest rank is best."""
        return (kl, turn) if self.kl is None else (turn, kl)


def best_pick(
    costs: Costs,
    choice: Choice,
    target: Target,
    scale: float = 1.0,
    lacking: Mapping[str, int] = MappingProxyType({}),
    *,
    tangents: int = TANGENTS,
) -> Pick | None:
    """The best choice; the square root of its flips has the tangent at the choice before."""
    best, least = None, math.inf
    for _ in range(tangents):
        pick = least_loss(_options(costs, choice, target, scale, lacking))
        if pick is None:
            break
        choice = pick.kind
        loss = loss_of(costs, target, pick)
        if loss < least:
            best = pick
        if loss > least * (1 - _GAIN):
            break
        least = min(least, loss)
    return best


def loss_of(costs: Costs, target: Target, pick: Pick) -> float:
    """What is least for a target, as modelled."""
    return costs.choices.kl(pick.kind) if target.kl is None else costs.seconds(pick)


def choice_of_size(choices: Choices, nbytes: float) -> Choice:
    """The choice of least KL divergence in so many bytes; its square root is a tangent."""
    loss = choices.tangent(choices.smallest())[None]
    costs = np.where(np.isfinite(loss), choices.nbytes, 0.0)[None]
    most = np.array([nbytes - choices.fixed_bytes])
    pick = least_loss(Options(loss, costs, most))
    return choices.smallest() if pick is None else pick.kind


def _options(
    costs: Costs, choice: Choice, target: Target, scale: float, lacking: Mapping[str, int]
) -> Options:
    """What can be chosen, with `lacking` bytes less of each device and `scale` times the time."""
    choices = costs.choices
    tangent = np.broadcast_to(choices.tangent(choice), costs.possible.shape)
    finite = np.where(costs.possible, tangent, 0.0)
    room = costs.room - [lacking.get(name, 0) for name in costs.devices]
    limits = [*zip(costs.nbytes, room, strict=True)]
    if target.nbytes is not None:
        limits.append((costs.nbytes.sum(0), target.nbytes - choices.fixed_bytes))
    if target.decode is not None:
        limits.append((costs.decode, target.decode * scale - costs.fixed_decode))
    if target.turn is not None:
        limits.append((costs.whole_turn, target.turn * scale - costs.fixed_turn))
    if target.kl is not None and math.isfinite(target.kl):
        # The square root of flips is below its tangent, half of which at zero is this.
        flips = float(np.take_along_axis(choices.flips, choice[:, None], 1).sum())
        limits.append((finite, target.kl - math.sqrt(flips) / 2))
    aim = tangent if target.kl is None else costs.whole_turn
    loss = np.where(costs.possible, aim, np.inf)
    most = np.array([limit for _, limit in limits])
    return Options(loss, np.stack([cost for cost, _ in limits]), most)
