"""FP8 weights with scales, as derived checkpoints publish them.

`X.weight` is F8_E4M3, and each weight is multiplied by its block's number in `X.weight_scale_inv`
(DeepSeek-V3's format; blocks are `weight_block_size` in config.json) or `X.weight_scale` (that of
compressed-tensors: one number for the matrix, for each row, or for each block).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import CheckpointError
from dots1_local.files.safetensors import Scales, Slice, read_exactly
from dots1_local.ggml import to_float32

__all__ = ["multiply_scales", "with_scales"]

_SCALED = "F8_E4M3"
_SUFFIXES = ("_scale_inv", "_scale")


def with_scales(slices: Mapping[str, Slice], raw_config: Mapping[str, Any]) -> dict[str, Slice]:
    """The tensors of a checkpoint: those in FP8 have their scales, which are no tensors then.

    Raises:
        CheckpointError: a tensor in FP8 has no scales, or scales of another shape.
    """
    scaled = [name for name, piece in slices.items() if _lacks_scales(piece)]
    found, block = dict(slices), _block_size(raw_config)
    for name in scaled:
        places = [found.pop(f"{name}{suffix}", None) for suffix in _SUFFIXES]
        scales = next((place for place in places if place is not None), None)
        if scales is None:
            raise CheckpointError(
                f"{name} in {slices[name].file.name} is {_SCALED} without {name}{_SUFFIXES[0]}; "
                "fetch the checkpoint whole, or convert the one that it was made of"
            )
        found[name] = replace(slices[name], scales=_scales(name, slices[name], scales, block))
        found.pop(f"{name.removesuffix('weight')}input_scale", None)  # of activations
    return found


def _lacks_scales(piece: Slice) -> bool:
    return piece.dtype == _SCALED and piece.scales is None


def _block_size(raw_config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, if config.json says them."""
    quantised = raw_config.get("quantization_config")
    if not isinstance(quantised, Mapping):
        return None
    sizes = [quantised.get("weight_block_size")]
    groups = quantised.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        sizes.append(weights.get("block_structure") if isinstance(weights, Mapping) else None)
    for size in sizes:
        match size:
            case [int(rows), int(columns)] if min(rows, columns) > 0:
                return rows, columns
    return None


def _scales(name: str, piece: Slice, place: Slice, block: tuple[int, int] | None) -> Scales:
    if len(piece.shape) != 2 or place.dtype == _SCALED:
        raise CheckpointError(
            f"{name} in {piece.file.name} is {_SCALED} in a form that is not read"
        )
    rows, columns = piece.shape
    forms = {(): (rows, columns), (1,): (rows, columns), (1, 1): (rows, columns)}
    forms |= {(rows,): (1, columns), (rows, 1): (1, columns)}
    if block is not None:
        forms[(-(-rows // block[0]), -(-columns // block[1]))] = block
    if place.shape not in forms:
        raise CheckpointError(
            f"the scales of {name} in {place.file.name} have shape {list(place.shape)}, which fits "
            f"{list(piece.shape)} neither by row nor by the weight_block_size of config.json"
        )
    return Scales(place, forms[place.shape])


def multiply_scales(weights: NDArray[np.float32], piece: Slice, rows: NDArray[np.intp]) -> None:
    """Multiply `weights`, these `rows` (n,) of a tensor, by their scales if the tensor has any.

    Raises:
        CheckpointError: the scales cannot be read.
    """
    if piece.scales is None:
        return
    height, width = piece.scales.block
    values = _values(piece.scales.place).reshape(-1, -(-piece.shape[1] // width))
    by_column = np.repeat(values[rows // height], width, axis=1)
    weights *= by_column[:, : weights.shape[1]]


@lru_cache(maxsize=256)
def _values(place: Slice) -> NDArray[np.float32]:
    raw, out = np.empty(place.nbytes, np.uint8), np.empty(place.shape, np.float32)
    try:
        with open(place.file, "rb") as file:
            read_exactly(file.fileno(), raw, place.offset, place.file)
    except OSError as error:
        raise CheckpointError(f"cannot read {place.file}: {error.strerror}") from None
    to_float32(raw, place.dtype, out)
    return out
