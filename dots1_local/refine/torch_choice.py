"""The choice of a sub-block's codes in torch, one group of columns after another.

As in torch_search.py, everything is (columns, tries). Each group knows the errors of those before
it. This is choose_all of cpp/choose.h, for all tries at once.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dots1_local.refine.blocks import BlockFormat
from dots1_local.refine.torch_search import Codebook, Group, Scalars

__all__ = ["Choice", "Chooser", "SubBlock"]


@dataclass(frozen=True)
class SubBlock:
    """The columns of a sub-block, and what decides on their codes.

    `form` (columns, columns) carries errors on, and `diagonal` (groups, vector, vector) is the form
    of the columns that share a code. With error feedback, `state` (columns, tries) are the weights
    plus what errors carried on to them, and `base` the weights. In coordinate descent, `state` is
    the gradient E H, and `base` are the present rounded weights.
    """

    form: Tensor
    diagonal: Tensor
    base: Tensor
    state: Tensor
    descends: bool
    half: Tensor | None = None  # (tries,): half of the codebook that codes are in

    def repeat(self, times: int) -> "SubBlock":
        """The tries several times over; their states change apart."""
        half = None if self.half is None else self.half.repeat(times)
        base, state = self.base.repeat(1, times), self.state.repeat(1, times)
        return replace(self, base=base, state=state, half=half)

    def slopes(self, part: slice) -> tuple[Tensor, Tensor]:
        """b, if q'Dq - 2 q'b is the cost of some groups of columns, and the best unrounded q."""
        forms, state = self._forms(part), self.state[part]
        if not self.descends:
            return _product(forms, state), state
        base, curvature = self.base[part], forms.diagonal(0, 1, 2).reshape(-1, 1)
        return _product(forms, base) + state, base + state / curvature

    def costs(self, part: slice, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The cost (tries,) of some groups' weights, and b and Dq (columns, tries)."""
        slopes, targets = self.slopes(part)
        product = _product(self._forms(part), weights)
        constant = targets * slopes
        if self.descends:
            constant = self.base[part] * (slopes + self.state[part])
        return (constant + weights * (product - 2 * slopes)).sum(0), slopes, product

    def carry(self, part: slice, weights: Tensor) -> None:
        """Let later columns know the errors, or changes, of the columns of `part`."""
        form = self.form[part, part.stop :].T
        self.state[part.stop :].addmm_(form, self.base[part] - weights)

    def _forms(self, part: slice) -> Tensor:
        size = self.diagonal.shape[-1]
        return self.diagonal[part.start // size : part.stop // size]


def _product(forms: Tensor, columns: Tensor) -> Tensor:
    """Multiply groups of columns by their forms (groups, vector, vector)."""
    groups: Tensor = columns.unflatten(0, (len(forms), -1))
    return (forms @ groups).flatten(0, 1)


@dataclass(frozen=True)
class Choice:
    """Codes (groups, tries) of a sub-block, and signs and weights (columns, tries).

    `signs` is (0, tries) if the type has none. `cost`, how it would fall with larger scales and
    mins, and its curvature in the scale are (tries,).
    """

    codes: Tensor
    signs: Tensor
    weights: Tensor
    cost: Tensor
    to_scale: Tensor
    to_min: Tensor
    square: Tensor


class Chooser:
    """The choice of codes for one type."""

    def __init__(self, form: BlockFormat, device: torch.device) -> None:
        self._form = form
        self._values = (Scalars if form.vector == 1 else Codebook)(form, device)

    def choose(self, sub: SubBlock, scales: Tensor, mins: Tensor) -> Choice:
        """Round all columns to scale × value - min; `scales` and `mins` are (tries,)."""
        if isinstance(self._values, Scalars):
            codes, weights = _choose_scalars(sub, self._values, scales, mins)
            signs = weights[:0]
        else:
            codes, signs, weights = _choose_groups(sub, self._values, self._form, scales)
        cost, slopes, product = sub.costs(slice(0, len(weights)), weights)
        unit, left = weights + mins, slopes - product
        to_scale, square = (unit * left).sum(0), (unit * product).sum(0)
        return Choice(codes, signs, weights, cost, to_scale, -left.sum(0), square)


def _choose_scalars(
    sub: SubBlock, scalars: Scalars, scales: Tensor, mins: Tensor
) -> tuple[Tensor, Tensor]:
    """Round column after column; the codes and weights (columns, tries)."""
    inverse = torch.where(scales != 0, 1 / scales, 0)
    offset, gain = (mins * inverse).expand_as(sub.state), inverse.expand_as(sub.state)
    if sub.descends:
        offset, gain = offset + sub.base * inverse, gain / sub.diagonal[:, 0]
    values = torch.empty_like(sub.state)
    for j, state in enumerate(sub.state):
        values[j] = scalars.nearest(torch.addcmul(offset[j], state, gain[j]))
        sub.carry(slice(j, j + 1), torch.addcmul(-mins, values[j], scales)[None])
    return scalars.codes(values), values * scales - mins


# Codes (groups, tries), signs and weights (columns, tries).
_Groups = tuple[Tensor, Tensor, Tensor]


def _choose_groups(sub: SubBlock, codebook: Codebook, form: BlockFormat, scales: Tensor) -> _Groups:
    """Round group after group, or pairs of groups of four if 8 columns share a parity."""
    parity = torch.zeros_like(scales) if form.signs == "even" else None
    pairs = parity is not None and form.vector == 4
    found = []
    for start in range(0, len(sub.state), 8 if pairs else form.vector):
        if pairs:
            found.append(_choose_pair(sub, codebook, scales, start))
        else:
            found.append(_choose_group(sub, codebook, scales, start, parity))
    codes, signs, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
    return codes, signs if form.signs != "none" else signs[:0], weights


def _choose_group(
    sub: SubBlock, codebook: Codebook, scales: Tensor, start: int, parity: Tensor | None
) -> _Groups:
    part = slice(start, start + len(codebook.values))
    slopes, targets = sub.slopes(part)
    group = Group(sub.diagonal[start // len(targets)], slopes, targets, parity, sub.half)
    codes, signs = codebook.best(group, scales)
    weights = codebook.values[:, codes] * signs * scales
    sub.carry(part, weights)
    return codes[None], signs, weights


def _choose_pair(sub: SubBlock, codebook: Codebook, scales: Tensor, start: int) -> _Groups:
    """Round two groups, both with an even or both with an odd number of minus signs."""
    both, twice = sub.repeat(2), scales.repeat(2)
    parity = torch.arange(2, device=scales.device).repeat_interleave(len(scales))
    found = [_choose_group(both, codebook, twice, k, parity) for k in (start, start + 4)]
    codes, signs, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
    costs, *_ = both.costs(slice(start, start + 8), weights)
    better = costs.unflatten(0, (2, -1)).argmin(0)[None, None]

    def chosen(tries: Tensor) -> Tensor:
        two: Tensor = tries.unflatten(1, (2, -1))
        return two.take_along_dim(better, 1).squeeze(1)

    sub.state.copy_(chosen(both.state))
    return chosen(codes), chosen(signs), chosen(weights)
