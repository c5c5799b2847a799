"""What importance is made of: squares of what each matrix is multiplied by, summed by column."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dots1_local.architecture import Dots1Config, inventory
from dots1_local.errors import CheckpointError

__all__ = ["SquareSums"]


class SquareSums:
    """The sums of one layer, an expert's apart from the others'; `observe` is an `Observer`.

    Without a layer they are those of the head, which is observed under its full name.
    """

    def __init__(self, config: Dots1Config, layer: int | None) -> None:
        self._prefix = "" if layer is None else f"model.layers.{layer}."
        self._places = {
            source: (spec, part)
            for spec in inventory(config)
            if spec.layer == layer
            for part, source in enumerate(spec.sources)
        }
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, NDArray[np.int64]] = {}

    def observe(self, name: str, rows: Tensor) -> None:
        """Take rows [rows, columns] into account that the named matrix will be multiplied by.

        Raises:
            CheckpointError: one of them is NaN or infinite.
        """
        spec, part = self._places[self._prefix + name]
        squares = rows.square().sum(0).double().cpu().numpy()
        if not np.isfinite(squares).all():
            raise CheckpointError(
                f"what reaches {self._prefix}{name} is NaN or infinite; is the checkpoint damaged?"
            )
        if spec.name not in self._sums:
            self._sums[spec.name] = np.zeros((len(spec.sources), spec.columns))
            self._counts[spec.name] = np.zeros(len(spec.sources), np.int64)
        self._sums[spec.name][part] += squares
        self._counts[spec.name][part] += len(rows)

    def by_name(self) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Sums (parts, columns) and counts (parts,) by GGUF name."""
        return {
            name: (sums.astype(np.float32), self._counts[name].astype(np.float32))
            for name, sums in self._sums.items()
        }
