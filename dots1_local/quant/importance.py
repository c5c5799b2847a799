"""Importance: how much each input column of a tensor matters.

A column's importance is the mean square of its activations over the calibration text.
`Importance.for_tensor` returns, to the last bit, what llama-quantize passes to its encoders for
the same importance file.

ggml's encoders store a block as zeros if the importance of all its columns is 0. A file may have
such gaps although it counts tokens. Stock mixes keep the gaps; elsewhere, `fill_gaps` fills them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dots1_local.architecture import TensorSpec
from dots1_local.errors import Dots1Error
from dots1_local.files.digest import file_sha256

__all__ = ["Floats", "Importance", "TensorSums", "fill_gaps", "pad_columns"]

Floats = NDArray[np.float32]

_SMALLEST_BLOCK = 16  # columns that share a scale, of all types


@dataclass(frozen=True)
class TensorSums:
    """Where a tensor's `values` float32 sums begin, and its counts: one, or one per expert."""

    offset: int
    values: int
    counts: Floats


@dataclass(frozen=True)
class Importance:
    """An importance file. Its numbers have been checked, and are read again when needed.

    `datasets` names the calibration texts, of which `chunk_count` chunks of `chunk_size` tokens
    were used; `chunk_size` is 0 in the .dat format. `tensors` is keyed by GGUF name.

    With `fills_gaps`, the encoders get importance without gaps, and a tensor whose sums are all 0
    is not covered.
    """

    path: Path
    legacy: bool
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int
    tensors: Mapping[str, TensorSums] = field(repr=False)
    fills_gaps: bool = False

    def __contains__(self, name: object) -> bool:
        return name in self.tensors and not (self.fills_gaps and name in self._empty)

    def filled(self) -> "Importance":
        """This file, used without its gaps."""
        return replace(self, fills_gaps=True)

    @cached_property
    def _empty(self) -> frozenset[str]:
        """The tensors whose sums are all 0."""
        return frozenset(name for name in self.tensors if not self.sums(name).any())

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the file."""
        return file_sha256(self.path)

    @cached_property
    def partial(self) -> dict[str, tuple[int, ...]]:
        """The experts that saw no token, by tensor; empty for .dat files, which do not say."""
        if self.legacy:
            return {}
        unseen = {name: np.flatnonzero(t.counts == 0) for name, t in self.tensors.items()}
        return {name: tuple(map(int, experts)) for name, experts in unseen.items() if experts.size}

    def sums(self, name: str) -> Floats:
        """A tensor's sums, (experts, columns); the .dat format has one row for all experts."""
        tensor = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            raw = file.read(tensor.values * 4)
        if len(raw) < tensor.values * 4:
            raise Dots1Error(f"{self.path} got shorter while it was read")
        return np.frombuffer(raw, "<f4").reshape(len(tensor.counts), -1)

    def get(self, name: str) -> Floats | None:
        """A tensor's importance, shaped as its `sums`, or None if the file does not cover it.

        Experts without tokens get 1 in every column, as llama.cpp does.
        """
        if name not in self.tensors:
            return None
        counts = self.tensors[name].counts
        seen = counts > 0
        mean = self.sums(name) / np.where(seen, counts, 1).astype(np.float32)[:, None]
        if not self.legacy:
            mean[~seen] = 1
        return mean

    def for_tensor(self, spec: TensorSpec) -> Floats | None:
        """A tensor's importance, (experts, columns), with zeros for padded columns.

        Raises:
            Dots1Error: the file was made from a model of another size.
        """
        values = self._values(spec)
        if values is None or (self.fills_gaps and spec.name not in self):
            return None
        if self.fills_gaps:
            values = fill_gaps(values[:, : spec.source_shape[-1]])
        return pad_columns(values, spec.columns)

    def gaps(self, spec: TensorSpec, block: int) -> tuple[int, ...]:
        """Count the columns of each expert of a tensor that are in blocks without importance."""
        values = self._values(spec)
        if values is None:
            return ()
        return tuple(_gaps(values[:, : spec.source_shape[-1]], block).sum(axis=1).tolist())

    def _values(self, spec: TensorSpec) -> Floats | None:
        columns, values = self._columns(spec), self.get(spec.name)
        return None if columns is None or values is None else values.reshape(-1, columns)

    def check(self, tensors: tuple[TensorSpec, ...]) -> None:
        """Refuse a file made from another model, before any work is done with it.

        Raises:
            Dots1Error: names the first tensor whose size does not match.
        """
        if not any(spec.name in self.tensors for spec in tensors):
            raise Dots1Error(f"{self.path} covers no tensor of this model")
        for spec in tensors:
            self._columns(spec)

    def _columns(self, spec: TensorSpec) -> int | None:
        """The columns that the file has for a tensor: padded as in `spec`, or unpadded."""
        if spec.name not in self.tensors:
            return None
        found = self.tensors[spec.name].values
        experts = spec.shape[0] if len(spec.shape) == 3 else 1
        for columns in (spec.columns, spec.source_shape[-1]):
            if found == experts * columns:
                return columns
        if spec.role == "embedding":  # stock ignores it too: these are often wrong
            return None
        raise Dots1Error(
            f"{self.path}: {spec.name} has {found} values where this model has "
            f"{experts} x {spec.columns}; the file was made from another model"
        )


def pad_columns(values: Floats, columns: int) -> Floats:
    """Append zero columns to (experts, columns) values; padding has no importance."""
    missing = columns - values.shape[-1]
    return values if missing == 0 else np.pad(values, ((0, 0), (0, missing)))


def fill_gaps(values: Floats) -> Floats:
    """Give columns without data the mean of those with data in their row of (experts, columns).

    Columns have no data where all 16 that share a scale are 0. A row without any data becomes ones,
    as in llama.cpp for an expert that saw no token.
    """
    gaps = _gaps(values, _SMALLEST_BLOCK)
    if not gaps.any():
        return values
    known = (~gaps).sum(axis=1)
    means = np.where(known, values.sum(axis=1) / np.maximum(known, 1), 1).astype(np.float32)
    return np.where(gaps, means[:, None], values)


def _gaps(values: Floats, block: int) -> NDArray[np.bool_]:
    """Whether a column (experts, columns) is in an aligned block of columns that are all 0."""
    columns = values.shape[1]
    blocks = pad_columns(values, -(-columns // block) * block).reshape(len(values), -1, block)
    return np.repeat(~blocks.any(axis=2), block, axis=1)[:, :columns]
