"""What llama.cpp loses by rounding what it multiplies its weights by.

Before a product with quantised weights its CPU kernels round activations to 8 bits, in blocks that
share a scale: of 32 for the types whose own blocks are of 32, of 256 for the others.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.architecture import Dots1Config, inventory

__all__ = ["BLOCKS", "ActivationNoise"]

BLOCKS = (32, 256)
_LEVELS = 127


class ActivationNoise:
    """Mean squared errors of the activations that reach the matrices of one layer.

    `observe` is an `Observer`. Layer None stands for the head.
    """

    def __init__(self, config: Dots1Config, layer: int | None) -> None:
        prefix = "" if layer is None else f"model.layers.{layer}."
        specs = [spec for spec in inventory(config) if spec.layer == layer]
        self._columns = {
            source.removeprefix(prefix): spec.columns for spec in specs for source in spec.sources
        }
        self._sources = {
            spec.name: [source.removeprefix(prefix) for source in spec.sources] for spec in specs
        }
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def observe(self, name: str, rows: Tensor) -> None:
        """Take rows [rows, columns] into account that the named matrix will be multiplied by."""
        exact = rows.detach().float()
        errors = [(_rounded(exact, block) - exact).square().sum(0) for block in BLOCKS]
        sums = torch.stack(errors).double().cpu()
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._counts[name] = self._counts.get(name, 0) + len(rows)

    def by_name(self) -> Mapping[str, NDArray[np.float32]]:
        """By GGUF name, for either length of blocks: (2, experts, columns); 0 where none came."""
        return {
            name: np.stack([self._mean(source) for source in sources], axis=1)
            for name, sources in self._sources.items()
            if any(source in self._sums for source in sources)
        }

    def _mean(self, source: str) -> NDArray[np.float32]:
        if source not in self._sums:
            return np.zeros((len(BLOCKS), self._columns[source]), np.float32)
        return (self._sums[source] / self._counts[source]).float().numpy()


def _rounded(rows: Tensor, block: int) -> Tensor:
    columns = rows.shape[-1]
    blocks = F.pad(rows, (0, -columns % block)).unflatten(-1, (-1, block))
    scales = blocks.abs().amax(-1, keepdim=True) / _LEVELS
    rounded: Tensor = (blocks / scales.where(scales > 0, torch.ones_like(scales))).round_() * scales
    return rounded.flatten(-2)[..., :columns]
