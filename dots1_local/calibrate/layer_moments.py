"""Second moments of the matrices of one layer, handed on as soon as their rows are complete.

`LayerMoments` observes a forward pass through the layer. The moments of all experts of a layer
would be 8.6 GB for dots.llm1, so each one goes to a `MomentSink`, which uses and drops it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.calibrate.hooks import Expert, Hooks
from dots1_local.calibrate.moments import Moment, Moments
from dots1_local.refine.metric import input_metric

__all__ = ["ENOUGH_TOKENS", "ExpertMoments", "LayerMoments", "MomentSink", "shrunk_moment"]

ENOUGH_TOKENS = 20  # tokens a column; with fewer, down's moment is shrunk towards other tokens'
_COMMON = (
    "self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight",
    "mlp.down_proj.weight", "mlp.shared_experts.gate_proj.weight",
    "mlp.shared_experts.down_proj.weight",
)  # fmt: skip
_FFN_INPUT = "mlp.shared_experts.gate_proj.weight"  # every token is an input of it

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ExpertMoments:
    """The moments of the inputs of an expert's gate and up, and of its down; None without tokens.

    `gate_prior` is over the inputs of all tokens, and `down_prior` over other tokens' rows put
    through this expert, where its own rows are few.
    """

    gate: Moment | None
    down: Moment | None
    gate_prior: Moment
    down_prior: Moment | None


class MomentSink(Protocol):
    """Takes the moments of a layer's matrices, by their names in the checkpoint.

    A moment that `moment_name` names serves the matrices with the same inputs, too.
    """

    def common(self, moments: Mapping[str, Moment]) -> None:
        """Take the moments of the matrices that all tokens use."""

    def expert(self, number: int, moments: ExpertMoments) -> None:
        """Take the moments of a routed expert's matrices."""


class LayerMoments:
    """Hands the moments of one layer to a sink; `observe` and `hooks` are for `forward_layer`.

    Only `experts` are observed, by default all. The observed rows are the first `rows` of x, by
    default all of them.
    """

    def __init__(
        self,
        layer: int,
        sink: MomentSink,
        experts: Collection[int] | None = None,
        rows: int | None = None,
    ) -> None:
        self._prefix, self._sink = f"model.layers.{layer}.", sink
        self._experts, self._rows = experts, rows
        self._moments = Moments()
        self._all_tokens: Moment
        self.hooks = Hooks(self._common, self._expert)

    def observe(self, name: str, rows: Tensor) -> None:
        """Add the rows [rows, columns] that the named matrix will be multiplied by."""
        _, is_routed, rest = name.partition("mlp.experts.")
        if not is_routed or self._wants(int(rest.partition(".")[0])):
            self._moments.observe(name, rows)

    def _wants(self, expert: int) -> bool:
        return self._experts is None or expert in self._experts

    def _common(self) -> None:
        taken = {name: moment for name in _COMMON if (moment := self._moments.take(name))}
        if _FFN_INPUT in taken:
            self._all_tokens = taken[_FFN_INPUT]
        self._sink.common({self._prefix + name: moment for name, moment in taken.items()})

    def _expert(self, expert: Expert) -> None:
        if not self._wants(expert.number):
            return
        prefix = f"mlp.experts.{expert.number}."
        gate = self._moments.take(f"{prefix}gate_proj.weight")
        down = self._moments.take(f"{prefix}down_proj.weight")
        columns = expert.stored[f"{prefix}down_proj.weight"].shape[1]
        few = down is None or down.tokens < ENOUGH_TOKENS * columns
        prior = self._other_tokens(expert, 2 * columns) if few else None
        self._sink.expert(expert.number, ExpertMoments(gate, down, self._all_tokens, prior))

    def _other_tokens(self, expert: Expert, count: int) -> Moment | None:
        """The moment of an expert's hidden rows for about `count` tokens not routed to it.

        These are evenly spaced over the text. It is None if every token was routed to the expert.
        """
        whole = len(expert.inputs) if self._rows is None else self._rows
        spaced = torch.arange(0, whole, max(1, whole // count), device=expert.rows.device)
        rows: Tensor = spaced[~torch.isin(spaced, expert.rows)]
        moments = Moments()
        replace(expert, inputs=expert.inputs[:whole]).hidden(rows, moments.observe)
        return moments.take(f"mlp.experts.{expert.number}.down_proj.weight")


def shrunk_moment(moment: Moment | None, prior: Moment | None) -> Floats:
    """The metric of an expert's inputs, or the prior alone if no token reached the expert."""
    if moment is not None:
        return input_metric(moment.mean, moment.tokens, None if prior is None else prior.mean)
    if prior is None:
        raise ValueError("an expert without tokens needs a prior")
    return input_metric(prior.mean, 0, prior.mean)
