"""Importance matrices: how much each input column of a tensor matters, as llama-quantize reads it.

A column's importance is the mean square of its activations over the calibration text. What
`Importance` returns is to the last bit what llama-quantize passes its encoders for the same file.
"""

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import TensorSpec
from dots1_local.errors import Dots1Error
from dots1_local.quant.imatrix_file import ImatrixFile, read_index, read_sums, write_gguf

__all__ = ["Importance", "load_importance", "pad_columns", "write_gguf"]


@dataclass(frozen=True)
class Importance:
    """An importance file whose index and numbers have been checked; values are read on demand."""

    file: ImatrixFile = field(repr=False)
    sha256: str

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the calibration texts."""
        return self.file.datasets

    @property
    def chunk_count(self) -> int:
        """Pieces of calibration text, of `file.chunk_size` tokens each."""
        return self.file.chunk_count

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors covered, by GGUF name."""
        return tuple(self.file.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.file.entries

    @cached_property
    def partial(self) -> dict[str, tuple[int, ...]]:
        """Tensors where some experts saw no token, and which; .dat files do not tell."""
        if self.file.legacy:
            return {}
        unseen = {name: np.flatnonzero(e.counts == 0) for name, e in self.file.entries.items()}
        return {name: tuple(map(int, experts)) for name, experts in unseen.items() if experts.size}

    def get(self, name: str) -> NDArray[np.float32] | None:
        """Importance as the file divides it, (experts, columns), or None if it has none.

        Experts without data get 1 everywhere. The .dat form is not divided: (1, all values).
        """
        entry = self.file.entries.get(name)
        if entry is None:
            return None
        return _normalised(read_sums(self.file, name), entry.counts, self.file.legacy)

    def for_tensor(self, spec: TensorSpec) -> NDArray[np.float32] | None:
        """Importance of a tensor, (experts, columns), padded with zeros where the tensor is.

        Raises:
            Dots1Error: the file's data are of another size, so of another model.
        """
        columns = self._columns(spec)
        values = self.get(spec.name)
        if columns is None or values is None:
            return None
        return pad_columns(values.reshape(-1, columns), spec.columns)

    def check(self, tensors: tuple[TensorSpec, ...]) -> None:
        """Refuse a file made from another model, before any work is done with it.

        Raises:
            Dots1Error: names the first tensor whose size does not match.
        """
        if not any(spec.name in self for spec in tensors):
            raise Dots1Error(f"{self.path} covers no tensor of this model")
        for spec in tensors:
            self._columns(spec)

    def _columns(self, spec: TensorSpec) -> int | None:
        """Columns of the file's data for a tensor: those stored, or those before padding."""
        entry = self.file.entries.get(spec.name)
        if entry is None:
            return None
        experts = spec.shape[0] if len(spec.shape) == 3 else 1
        for columns in (spec.columns, spec.source_shape[-1]):
            if entry.values == experts * columns:
                return columns
        if spec.role == "embedding":  # stock ignores it too: these are often wrong
            return None
        raise Dots1Error(
            f"{self.path}: {spec.name} has {entry.values} values where this model has "
            f"{experts} x {spec.columns}; it was made from another model"
        )


def load_importance(path: str | os.PathLike[str]) -> Importance:
    """Open an importance file in either form and check every number in it.

    Raises:
        Dots1Error: missing, truncated or corrupt; the message names the file and the tensor.
    """
    index = read_index(Path(path))
    for name in index.entries:
        _check_sums(index.path, name, read_sums(index, name))
    with index.path.open("rb") as file:
        return Importance(index, hashlib.file_digest(file, "sha256").hexdigest())


def pad_columns(values: NDArray[np.float32], columns: int) -> NDArray[np.float32]:
    """Append zero columns to (experts, columns) values; padding has no importance."""
    missing = columns - values.shape[-1]
    return values if missing == 0 else np.pad(values, ((0, 0), (0, missing)))


def _check_sums(path: Path, name: str, sums: NDArray[np.float32]) -> None:
    if not np.all((sums >= 0) & np.isfinite(sums)):
        raise Dots1Error(f"{path}: {name} has a sum that is negative or no number")


def _normalised(
    sums: NDArray[np.float32], counts: NDArray[np.float32], legacy: bool
) -> NDArray[np.float32]:
    seen = counts > 0
    mean = sums / np.where(seen, counts, 1).astype(np.float32)[:, None]
    if not legacy:
        mean[~seen] = 1
    return mean
