"""The table of quantisation types: block length, bytes a block takes, which rows they fit.

Ids and block sizes are ggml's (`enum ggml_type`); tests compare them with gguf-py's table and
with the installed engine.
"""

from dataclasses import dataclass

from dots1_local.errors import UsageError

__all__ = ["TYPES", "QuantType", "quant_type"]


@dataclass(frozen=True)
class QuantType:
    """A tensor type of ggml: `block` weights are stored in `bytes` bytes."""

    name: str
    ggml: int
    block: int
    bytes: int
    needs_importance: bool = False

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return self.bytes * 8 / self.block

    def fits(self, columns: int) -> bool:
        """Whether a row of `columns` weights is a whole number of blocks."""
        return columns % self.block == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` weights."""
        if not self.fits(columns):
            raise UsageError(
                f"{self.name} stores rows in blocks of {self.block}, which {columns} is no "
                "multiple of"
            )
        return columns // self.block * self.bytes


TYPES: dict[str, QuantType] = {
    entry.name: entry
    for entry in (
        QuantType("F32", 0, 1, 4),
        QuantType("F16", 1, 1, 2),
        QuantType("BF16", 30, 1, 2),
        QuantType("Q8_0", 8, 32, 34),
        QuantType("Q6_K", 14, 256, 210),
        QuantType("Q5_K", 13, 256, 176),
        QuantType("Q5_1", 7, 32, 24),
        QuantType("Q5_0", 6, 32, 22),
        QuantType("Q4_K", 12, 256, 144),
        QuantType("Q4_1", 3, 32, 20),
        QuantType("Q4_0", 2, 32, 18),
        QuantType("IQ4_NL", 20, 32, 18),
        QuantType("IQ4_XS", 23, 256, 136),
        QuantType("MXFP4", 39, 32, 17),
        QuantType("Q3_K", 11, 256, 110),
        QuantType("IQ3_S", 21, 256, 110),
        QuantType("IQ3_XXS", 18, 256, 98),
        QuantType("Q2_K", 10, 256, 84),
        QuantType("IQ2_S", 22, 256, 82),
        QuantType("IQ2_XS", 17, 256, 74, needs_importance=True),
        QuantType("IQ2_XXS", 16, 256, 66, needs_importance=True),
        QuantType("IQ1_M", 29, 256, 56),
        QuantType("IQ1_S", 19, 256, 50, needs_importance=True),
    )
}


def quant_type(name: str) -> QuantType:
    """The type called `name`, in any case.

    Raises:
        UsageError: no such type; the message lists those there are.
    """
    try:
        return TYPES[name.upper()]
    except KeyError:
        raise UsageError(f"no type {name!r}; there are {', '.join(TYPES)}") from None
