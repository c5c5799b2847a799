"""Sums over the inputs of each matrix of a layer, such as importance is made of."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.architecture import Dots1Config, inventory
from dots1_local.calibrate.calibration_folder import Entries
from dots1_local.errors import CheckpointError

__all__ = ["ColumnSums", "square_sums"]


def square_sums(rows: Tensor) -> Tensor:
    """The second moments that importance is made of: [1, columns], summed over rows."""
    return rows.square().sum(0, keepdim=True)


class ColumnSums:
    """Sums over the inputs of each matrix of one layer, or of the head if `layer` is None.

    `measure` maps rows [rows, columns] to [figures, columns]. `observe` is an `Observer`; names are
    relative to the layer, and the head has its full name. Each expert has sums of its own.
    """

    def __init__(
        self, config: Dots1Config, layer: int | None, measure: Callable[[Tensor], Tensor]
    ) -> None:
        self._measure = measure
        self._prefix = "" if layer is None else f"model.layers.{layer}."
        self._places = {
            source: (spec, expert)
            for spec in inventory(config)
            if spec.layer == layer
            for expert, source in enumerate(spec.sources)
        }
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, NDArray[np.int64]] = {}

    def observe(self, name: str, rows: Tensor) -> None:
        """Add the rows [rows, columns] that the named matrix will be multiplied by.

        Raises:
            CheckpointError: one of them is NaN or infinite.
        """
        spec, expert = self._places[self._prefix + name]
        figures = self._measure(rows.detach()).double().cpu().numpy()
        if not np.isfinite(figures).all():
            raise CheckpointError(
                f"an input of {self._prefix}{name} is NaN or infinite; is the checkpoint damaged?"
            )
        if spec.name not in self._sums:
            self._sums[spec.name] = np.zeros((len(figures), len(spec.sources), spec.columns))
            self._counts[spec.name] = np.zeros(len(spec.sources), np.int64)
        self._sums[spec.name][:, expert] += figures
        self._counts[spec.name][expert] += len(rows)

    def first(self) -> Entries:
        """By GGUF name: sums (experts, columns) of the first figure, and counts (experts,)."""
        return {
            name: (sums[0].astype(np.float32), self._counts[name].astype(np.float32))
            for name, sums in self._sums.items()
        }

    def means(self) -> dict[str, NDArray[np.float32]]:
        """By GGUF name: means (figures, experts, columns), which are 0 for experts without rows."""
        return {
            name: (sums / np.maximum(self._counts[name], 1)[:, None]).astype(np.float32)
            for name, sums in self._sums.items()
        }
