"""The choice of a sub-block's scale, min and codes in torch: choose_block of cpp/choose.h.

The levels at present are tried first. Their neighbours on the side where the cost falls are then
tried, all at once; without mins, only if the best scale is far enough from the present one.
"""

from dataclasses import replace

import torch
from torch import Tensor

from dots1_local.refine.torch_blocks import Columns
from dots1_local.refine.torch_choice import Choice, Chooser, SubBlock

__all__ = ["choose_levels"]

_LEAST_STEP = 0.2  # as in choose.h

# The scales and mins of a choice, its codes, signs, weights and costs: (items, tries).
_Tried = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def choose_levels(chooser: Chooser, columns: Columns, sub: SubBlock, part: slice) -> Tensor:
    """Choose scale, min and codes of the sub-block `part`; returns its weights (columns, rows).

    In coordinate descent, what is there stays if nothing is better.
    """
    scales, mins = columns.levels(part)
    first = _choose(chooser, columns, sub, part, scales, mins)
    tried = [_tried(scales, mins, first)]
    if len(columns.form.steps) > 1:
        tried.append(_try_neighbours(chooser, columns, sub, part, first))
    if sub.descends:
        codes, signs = columns.chosen(part)
        tried.insert(0, (scales, mins, codes, signs, sub.base, torch.zeros_like(sub.base[:1])))
    best = _best(tried, rows=sub.base.shape[1])
    columns.change(part, *best[:4])
    return best[4]


def _choose(
    chooser: Chooser, columns: Columns, sub: SubBlock, part: slice, scales: Tensor, mins: Tensor
) -> Choice:
    """Choose the codes with each of some levels (tries, rows)."""
    scale, low = columns.factors(part, scales, mins)
    return chooser.choose(sub.repeat(len(scales)), scale.flatten(), low.flatten())


def _try_neighbours(
    chooser: Chooser, columns: Columns, sub: SubBlock, part: slice, first: Choice
) -> _Tried:
    scales, mins = _neighbours(columns, part, first)
    scales, scale_exists = _within(scales, len(columns.form.steps))
    mins, min_exists = _within(mins, max(columns.form.mins, 1))
    allowed = scale_exists & min_exists
    if columns.form.mins <= 1:
        least = _LEAST_STEP * columns.step * first.square
        allowed &= (first.to_scale * columns.steps(part)).abs() >= least.abs()
    found = _choose(chooser, columns, sub, part, scales, mins)
    cost = found.cost.where(allowed.flatten(), torch.inf)
    return _tried(scales, mins, replace(found, cost=cost))


def _neighbours(columns: Columns, part: slice, first: Choice) -> tuple[Tensor, Tensor]:
    """Scales and mins (tries, rows) on the side where the cost falls, though they may not exist."""
    scales, mins = columns.levels(part)
    near = scales + torch.where((first.to_scale > 0) == (columns.steps(part) > 0), 1, -1)
    if columns.form.mins <= 1:
        return near, mins
    dmin = columns.factors(part, scales, torch.ones_like(mins))[1]
    beside = mins + torch.where((first.to_min > 0) == (dmin > 0), 1, -1)
    return torch.cat([near, scales, near]), torch.cat([mins, beside, beside])


def _within(levels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Levels limited to those that there are, and which of them were."""
    limited = levels.clamp(0, count - 1)
    return limited, limited == levels


def _tried(scales: Tensor, mins: Tensor, choice: Choice) -> _Tried:
    levels = (scales.reshape(1, -1), mins.reshape(1, -1))
    return (*levels, choice.codes, choice.signs, choice.weights, choice.cost[None])


def _best(tried: list[_Tried], rows: int) -> list[Tensor]:
    """What costs least for each row, the first if several do: tensors (items, rows)."""
    joined = [torch.cat(parts, 1).unflatten(1, (-1, rows)) for parts in zip(*tried, strict=True)]
    least = joined[-1].argmin(1, keepdim=True)
    return [x.take_along_dim(least, 1).squeeze(1) for x in joined]
