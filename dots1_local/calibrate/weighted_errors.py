"""What the errors of refined rows cost at the tokens where they occur.

For inputs x of a matrix and gradients g at its outputs, an error E costs the mean of g^2 (E x)^2.
The product of both means is as good for plain errors, which are alike in all directions of x.
Refinement leaves errors in directions that few tokens have, and these tokens tend to have larger
gradients. The mean of the product is measured on the probed tokens, for one type of each tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.architecture import TensorSpec
from dots1_local.calibrate.refined_errors import ErrorRows

__all__ = ["WeightedErrors"]

Doubles = NDArray[np.float64]
Pair = tuple[float, float]


@dataclass
class _Sums:
    """Sums over the gradients of one matrix, for damage and for flips.

    `costs` (2, 2) are of g^2 (E x)^2 over its rows, too; the last axis is refined, plain. Rows that
    were drawn with small chances count more.
    """

    squares: Doubles  # (2, rows): of g^2
    errors: Doubles  # (2, 2, rows): of (E x)^2, for refined and plain E
    costs: Doubles
    count: Doubles = field(default_factory=lambda: np.zeros(2))

    @classmethod
    def zeros(cls, rows: int) -> "_Sums":
        return cls(np.zeros((2, rows)), np.zeros((2, 2, rows)), np.zeros((2, 2)))

    @property
    def expected(self) -> Doubles:
        """`costs`, if g^2 and (E x)^2 were independent."""
        products: Doubles = (self.errors @ self.squares[..., None])[..., 0]
        return products / np.maximum(self.count, 1)[:, None]


class WeightedErrors:
    """Observes the inputs and the gradients of the matrices of a layer, or of the head.

    `rows` are by the matrices' names in the checkpoint; the methods that observe take names
    relative to the layer.
    """

    def __init__(self, rows: Mapping[str, ErrorRows], prefix: str = "") -> None:
        self._rows = {name.removeprefix(prefix): each for name, each in rows.items()}
        self._prefix = prefix
        self._sums = {name: _Sums.zeros(len(each.numbers)) for name, each in self._rows.items()}
        self._errors: dict[str, Tensor] = {}

    def observe(self, name: str, inputs: Tensor) -> None:
        """Take the inputs [tokens, columns] of a matrix."""
        if name in self._rows:
            errors = torch.from_numpy(self._rows[name].errors).to(inputs.device).float()
            self._errors[name] = (inputs.detach().float() @ errors.mT).square()

    def observe_squares(self, name: str, is_tie: bool, squares: Tensor) -> None:
        """Take squared gradients [tokens, rows of the matrix] at the outputs of those inputs."""
        if name not in self._rows:
            return
        rows, sums, kind = self._rows[name], self._sums[name], int(is_tie)
        drawn = squares[:, rows.numbers] / torch.from_numpy(rows.chances).to(squares.device)
        errors = self._errors[name]
        reached = drawn.any(-1).float()  # a next expert has inputs, but no gradient
        sums.squares[kind] += _double(drawn.sum(0))
        sums.errors[kind] += _double((errors * reached[:, None]).sum(1))
        sums.costs[kind] += _double((errors * drawn).sum((1, 2)))
        sums.count[kind] += float(reached.sum())

    def factors(self, spec: TensorSpec) -> Pair:
        """What refined errors of a tensor cost by what their mean squares predict, relative to
        plain errors: for damage and for flips."""
        names = (source.removeprefix(self._prefix) for source in spec.sources)
        found = [self._sums[name] for name in names if name in self._sums]
        costs = sum((each.costs for each in found), np.zeros((2, 2)))
        expected = sum((each.expected for each in found), np.zeros((2, 2)))
        damage, flips = (
            float(cost[0] / mean[0] * mean[1] / cost[1]) if cost.all() and mean.all() else 1.0
            for cost, mean in zip(costs, expected, strict=True)
        )
        return damage, flips


def _double(values: Tensor) -> Doubles:
    return values.cpu().double().numpy()
