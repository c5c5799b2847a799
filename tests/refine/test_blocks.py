"""Blocks taken apart and put together, judged by ggml's own encoder and decoder."""

import gguf.quants
import numpy as np
import pytest
from numpy.typing import NDArray

from dots1_local.errors import UsageError
from dots1_local.ggml import TYPES, QuantType
from dots1_local.quant.encode import bad_blocks, decode, encode
from dots1_local.refine.blocks import block_format, pack, refinable, unpack, weights

COLUMNS = 512
BLOCK_TYPES = [
    kind for kind in TYPES.values() if kind.candidate and kind.block > 1 and kind.name != "MXFP4"
]
# ggml takes seconds to start the encoders of the others.
QUICKLY_ENCODED = [kind for kind in BLOCK_TYPES if not kind.name.startswith(("IQ1", "IQ2"))]

every_type = pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)


def encoded(kind: QuantType) -> NDArray[np.uint8]:
    """Random weights with some large ones, as ggml stores them."""
    rng = np.random.default_rng(1)
    rows = rng.standard_t(4, (5, COLUMNS)).astype(np.float32)
    rows[3] = 0
    return encode(rows, kind, rng.uniform(0.1, 2, COLUMNS).astype(np.float32))


def random_bytes(kind: QuantType) -> NDArray[np.uint8]:
    """Blocks that use all patterns of bits, except infinite scales."""
    data = np.random.default_rng(2).integers(0, 256, (50, kind.row_bytes(COLUMNS)), np.uint8)
    data.reshape(-1, kind.bytes)[bad_blocks(data.reshape(-1), kind.name)] = 0
    return data


def bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    return values.view(np.uint32)


def test_candidates_of_blocks_are_refinable_except_that_with_powers_of_two() -> None:
    assert [kind for kind in TYPES.values() if refinable(kind)] == BLOCK_TYPES


def check_inverse(data: NDArray[np.uint8], kind: QuantType) -> None:
    blocks = unpack(data, kind)
    assert np.array_equal(pack(blocks, kind), data)
    assert np.array_equal(bits(weights(blocks, kind)), bits(decode(data, kind, COLUMNS)))


@every_type
def test_any_blocks_are_put_together_as_they_were(kind: QuantType) -> None:
    check_inverse(random_bytes(kind), kind)


@pytest.mark.parametrize("kind", QUICKLY_ENCODED, ids=lambda kind: kind.name)
def test_ggmls_blocks_are_put_together_as_they_were(kind: QuantType) -> None:
    check_inverse(encoded(kind), kind)


@every_type
def test_fields_make_the_weights_that_ggml_decodes(kind: QuantType) -> None:
    """The formula, written out column by column."""
    data = random_bytes(kind)
    blocks, made = unpack(data, kind), block_format(kind)
    column = np.arange(COLUMNS)
    values = made.values[blocks.codes[:, column // made.vector], column % made.vector]
    if made.signs != "none":
        values = np.where(blocks.signs[:, column // 8] >> column % 8 & 1, -values, values)
    scale = made.steps[blocks.scales[:, column // made.sub]]
    product = blocks.d[:, column // made.block] * scale * values
    if made.mins:
        product -= blocks.dmin[:, column // made.block] * blocks.mins[:, column // made.sub]
    assert np.array_equal(product, decode(data, kind, COLUMNS))


@every_type
def test_another_choice_of_fields_is_stored(kind: QuantType) -> None:
    """Fields of one matrix, in random order, are read back as they were written."""
    rng = np.random.default_rng(3)
    blocks, made = unpack(random_bytes(kind), kind), block_format(kind)
    blocks.d = rng.permuted(blocks.d, axis=1)
    blocks.scales = rng.permuted(blocks.scales, axis=1)
    blocks.signs = rng.permuted(blocks.signs, axis=1)
    if not made.shared_half:
        blocks.codes = rng.permuted(blocks.codes, axis=1)
    again = unpack(pack(blocks, kind), kind)
    for name, values in vars(blocks).items():
        assert np.array_equal(vars(again)[name], values), name


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_codebooks_are_those_of_gguf_py(name: str) -> None:
    grid = getattr(gguf.quants, name)
    grid.init_grid()
    assert np.array_equal(block_format(TYPES[name]).values, grid.grid.reshape(grid.grid_shape))


@pytest.mark.parametrize(
    ("name", "sub", "vector", "levels", "mins", "signs"),
    [
        ("Q2_K", 16, 1, 16, 16, "none"),
        ("Q3_K", 16, 1, 64, 0, "none"),
        ("Q5_K", 32, 1, 64, 64, "none"),
        ("Q6_K", 16, 1, 256, 0, "none"),
        ("Q4_1", 32, 1, 1, 1, "none"),
        ("IQ2_XXS", 32, 8, 16, 0, "even"),
        ("IQ2_S", 16, 8, 16, 0, "free"),
        ("IQ3_S", 32, 4, 16, 0, "free"),
        ("IQ1_M", 16, 8, 8, 0, "none"),
    ],
)
def test_formats_say_what_may_be_chosen(
    name: str, sub: int, vector: int, levels: int, mins: int, signs: str
) -> None:
    made = block_format(TYPES[name])
    assert (made.sub, made.vector, len(made.steps), made.mins, made.signs) == (
        sub, vector, levels, mins, signs
    )  # fmt: skip
    assert np.all(np.diff(made.steps) > 0)


def test_signs_are_even_where_the_format_says_so() -> None:
    for kind in BLOCK_TYPES:
        if block_format(kind).signs == "even":
            signs = unpack(random_bytes(kind), kind).signs
            assert not np.any(np.unpackbits(signs[..., None], axis=-1).sum(-1) % 2)


@pytest.mark.parametrize("name", ["F16", "MXFP4"])
def test_other_types_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        block_format(TYPES[name])
