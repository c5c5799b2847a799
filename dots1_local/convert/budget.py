"""What bounds a file that is to be made: its size, its bits per weight, or its damage."""

from collections.abc import Callable
from dataclasses import dataclass
from math import floor, log10
from typing import Literal

from dots1_local.errors import UsageError
from dots1_local.quant.allocate import Allocator, Rounding
from dots1_local.quant.allocation import Allocation

__all__ = ["Budget"]


@dataclass(frozen=True)
class Budget:
    """One bound and its value.

    "size" is in bytes of all files, headers and alignment included; "weights" in bytes of the
    tensors alone, and may be more than there is a use for; "bpw" in bits of the tensors per
    parameter of the model; "kld" in nats a token.
    """

    kind: Literal["size", "weights", "bpw", "kld"]
    value: float

    def __post_init__(self) -> None:
        if not 0 < self.value < 1e18:  # nor NaN
            raise UsageError(f"{self.value:g} is no budget")

    def __str__(self) -> str:
        if self.kind == "kld":
            return f"KLD {self.value:g}"
        return f"{self.value:g} bpw" if self.kind == "bpw" else _decimal(self.value)

    def allocate(
        self, allocator: Allocator, parameters: int, overhead: Callable[[Allocation | None], int]
    ) -> Allocation:
        """The best plan for a model of so many `parameters` under this budget.

        `overhead` tells the bytes that a file of a plan takes beside its tensors; given None, of
        any plan.

        Raises:
            UsageError: out of reach; the message names what is possible.
        """
        recipe = f"measured {self}"
        if self.kind == "kld":
            return allocator.reaching(self.value, recipe)
        if self.kind == "bpw":
            unit = parameters / 8

            def say(count: float, rounding: Rounding) -> str:
                return f"{rounding(count / unit * 1e4) / 1e4:g} bpw"

            return allocator.within(self.value * unit, recipe, say)
        if self.kind == "weights":
            return allocator.within(min(self.value, allocator.largest), recipe, _decimal)
        extra = overhead(None)
        while True:  # shards change with the plan, and with them the bytes of headers
            allocation = self._beside(allocator, extra, recipe)
            if (found := overhead(allocation)) <= extra:
                return allocation
            extra = found

    def _beside(self, allocator: Allocator, extra: int, recipe: str) -> Allocation:
        def say(count: float, rounding: Rounding) -> str:
            return _decimal(count + extra, rounding)

        return allocator.within(self.value - extra, recipe, say)


def _decimal(count: float, rounding: Rounding = round) -> str:
    """48000000000 -> '48 GB', to five digits."""
    unit, scale = next(
        ((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= s), ("B", 1.0)
    )
    digits = 10.0 ** (4 - floor(log10(max(count / scale, 1))))
    return f"{rounding(count / scale * digits) / digits:.9g} {unit}"
