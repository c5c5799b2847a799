"""The true width of a file's experts: padding is zeros at the end of every expert.

No key records the width. A unit whose rows of gate and up are zero adds exactly nothing to an
expert's output, whatever its column of down decodes to, so the model without it computes the same.
A unit is padding only if this holds for every expert in every layer.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dots1_local.architecture import Dots1Config
from dots1_local.files.gguf import GGUFTensor, OpenFiles, cores
from dots1_local.ggml import TYPES
from dots1_local.progress import Progress, silent
from dots1_local.quant.encode import decode

__all__ = ["true_width"]

_PIECE = 1 << 20  # weights that are decoded at a time


@dataclass(frozen=True)
class _Units:
    """`width` units of an expert, `per_unit` rows each, from `first_row` of a tensor on."""

    tensor: GGUFTensor
    first_row: int
    width: int
    per_unit: int


def true_width(
    tensors: Mapping[str, GGUFTensor],
    config: Dots1Config,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> int:
    """The experts' width without padding; `config` has the stored width."""
    stored = config.moe_intermediate_size
    units = list(_all_units(tensors, config))
    with OpenFiles() as files:
        width = _needed(files, units[0], 0) if units else stored
        if width == stored:  # as in any file without padding
            return stored
        pool = ThreadPoolExecutor(threads or cores(), thread_name_prefix="width")
        try:
            least = width
            needed = pool.map(lambda part: _needed(files, part, least), units)
            for done, found in enumerate(needed, 1):
                width = max(width, found)
                progress(done, len(units), "experts", "looking for padding")
                if width == stored:
                    break
        finally:
            pool.shutdown(cancel_futures=True)
    return width or stored


def _all_units(tensors: Mapping[str, GGUFTensor], config: Dots1Config) -> Iterator[_Units]:
    width, shared = config.moe_intermediate_size, config.n_shared_experts
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        for part in ("gate", "up"):
            routed = tensors[f"blk.{layer}.ffn_{part}_exps.weight"]
            for expert in range(config.n_routed_experts):
                yield _Units(routed, expert * width, width, 1)
            yield _Units(tensors[f"blk.{layer}.ffn_{part}_shexp.weight"], 0, width, shared)


def _needed(files: OpenFiles, units: _Units, least: int) -> int:
    """The number of units up to the last one that is not zero, but at least `least`."""
    tensor, kind = units.tensor, TYPES[units.tensor.type]
    columns = tensor.shape[-1]
    row_bytes = kind.row_bytes(columns)
    step = max(1, _PIECE // columns)
    first, stop = least * units.per_unit, units.width * units.per_unit
    while stop > first:
        start = max(first, stop - step)
        offset = tensor.offset + (units.first_row + start) * row_bytes
        data = files.read(tensor.file, offset, (stop - start) * row_bytes)
        filled = np.flatnonzero(decode(data.reshape(-1, row_bytes), kind, columns).any(axis=1))
        if filled.size:
            return -(-(start + int(filled[-1]) + 1) // units.per_unit)
        stop = start
    return least
