"""The search for codes in torch: the nearest of scalar values, and the best entry of a codebook.

Everything is (columns, tries): a try is a row with one of the scales that are tried for it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dots1_local.refine.blocks import BlockFormat

__all__ = ["Codebook", "Group", "Scalars"]

_COSTS = 1 << 26  # that are in memory at a time: 256 MiB


class Scalars:
    """The values of a type whose codes stand for one column."""

    def __init__(self, form: BlockFormat, device: torch.device) -> None:
        values = form.values[:, 0]
        self._least, self._most = float(values[0]), float(values[-1])
        self._even = bool((np.diff(values) == 1).all())
        self._values = torch.tensor(values, device=device)
        self._between = (self._values[1:] + self._values[:-1]) / 2

    def nearest(self, x: Tensor) -> Tensor:
        """The values next to `x`."""
        if self._even:
            return x.round().clamp_(self._least, self._most)
        return self._values[torch.bucketize(x, self._between)]

    def codes(self, values: Tensor) -> Tensor:
        """The codes of values."""
        if self._even:
            return (values - self._least).long()
        return torch.bucketize(values, self._between)


@dataclass(frozen=True)
class Group:
    """What decides on the codes of a group of columns: the cost of q is q'Dq - 2 q'b.

    `form` is D (vector, vector), `slopes` are b and `targets` (both (vector, tries)) the best
    unrounded weights, whose signs are the natural ones. `parity` (tries,) allows only even (0) or
    odd (1) numbers of minus signs; `half` (tries,) only codes of one half of the codebook.
    """

    form: Tensor
    slopes: Tensor
    targets: Tensor
    parity: Tensor | None = None
    half: Tensor | None = None

    def tries(self, chosen: slice) -> "Group":
        """Some of the tries."""
        parity, half = (None if x is None else x[chosen] for x in (self.parity, self.half))
        slopes, targets = self.slopes[:, chosen], self.targets[:, chosen]
        return Group(self.form, slopes, targets, parity, half)


class Codebook:
    """The values of a type whose codes stand for 4 or 8 columns.

    The costs of all codes are one matrix product: of the codes' values and the products of every
    two of them, with the scales, signs and forms of the tries. All codes are tried with the natural
    signs and with every single flip; if only even or odd numbers of minus signs are allowed, with
    the natural ones if they are allowed, and else with the single flips.
    """

    def __init__(self, form: BlockFormat, device: torch.device) -> None:
        self.values = torch.tensor(form.values.T.copy(), device=device)  # (vector, codes)
        size, codes = self.values.shape
        self._first, self._second = torch.triu_indices(size, size, device=device)
        self._twice = 2.0 - (self._first == self._second).float()
        products = self.values[self._first] * self.values[self._second]
        self._table = torch.cat([products, self.values]).T.contiguous()
        flips = 1 - 2 * torch.eye(size, size + 1, device=device)
        self._flips = flips if form.signs != "none" else flips[:, -1:]  # the last: no flip
        self._halves = torch.arange(codes, device=device)[:, None] * 2 // codes

    def best(self, group: Group, scales: Tensor) -> tuple[Tensor, Tensor]:
        """The best codes (tries,) of a group, and their signs (vector, tries), which are ±1."""
        step = max(_COSTS // (self._table.shape[0] * self._flips.shape[1]), 1)
        starts = range(0, len(scales), step)
        parts = [slice(start, start + step) for start in starts]
        found = [self._best(group.tries(part), scales[part]) for part in parts]
        codes, signs = zip(*found, strict=True)
        return torch.cat(codes), torch.cat(signs, dim=1)

    def _best(self, group: Group, scales: Tensor) -> tuple[Tensor, Tensor]:
        form = group.form[self._first, self._second] * self._twice
        squares, slopes = torch.outer(form, scales * scales), -2 * scales * group.slopes
        signs = self._signs(group, scales, squares, slopes)
        costs = self._costs(squares, slopes, signs)
        if group.half is not None:
            costs.masked_fill_(self._halves != group.half, torch.inf)
        return costs.argmin(0), signs

    def _signs(self, group: Group, scales: Tensor, squares: Tensor, slopes: Tensor) -> Tensor:
        """The best signs (vector, tries) with any code."""
        if self._flips.shape[1] == 1:
            return torch.ones_like(group.targets)
        natural = 1 - 2 * (group.targets * scales < 0).float()
        signs = natural[:, None] * self._flips[..., None]
        costs = self._costs(squares[:, None], slopes[:, None], signs).amin(0)
        if group.parity is not None:
            odd = (natural < 0).sum(0) % 2
            flipped = torch.arange(len(costs), device=costs.device) < len(costs) - 1
            costs.masked_fill_(flipped[:, None] == (odd == group.parity), torch.inf)
        return natural * self._flips[:, costs.argmin(0)]

    def _costs(self, squares: Tensor, slopes: Tensor, signs: Tensor) -> Tensor:
        """The costs (codes, ...) of all codes with `signs` (vector, ...)."""
        pairs = signs[self._first] * signs[self._second]
        features = torch.cat([squares * pairs, slopes * signs])
        costs = self._table @ features.reshape(len(features), -1)
        return costs.reshape(-1, *signs.shape[1:])
