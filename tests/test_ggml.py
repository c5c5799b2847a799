"""Every type of the table against gguf-py and ggml, and what its encoder must keep."""

import ctypes

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dots1_local import ggml
from dots1_local.errors import UsageError
from dots1_local.ggml import TYPES, QuantType, quant_type
from dots1_local.quant.encode import decode, encode

every_type = pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES.keys())
Floats = NDArray[np.float32]

# With importance these weigh an error by the mean square of the whole row, not of the block.
WHOLE_ROW = {"Q4_0", "Q4_1", "Q5_0", "Q5_1"}
# Made for models that were trained with a few values; their scale is the largest weight, or the
# mean size of weights in Q1_0.
VALUES = {"Q2_0": (-1, 0, 1), "TQ2_0": (-1, 0, 1), "TQ1_0": (-1, 0, 1), "Q1_0": (-1, 1)}
# Types that gguf-py does not decode, and one that it does not know.
BITS, UNKNOWN = {"Q1_0": 1, "Q2_0": 2}, {"Q2_0"}
# Float formats err by a share of each value, not of the block's largest.
FLOAT_ERROR = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8}


def gaussian(rows: int, columns: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def weights(columns: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).random(columns).astype(np.float32) + np.float32(0.1)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Floats, Floats]:
    """Rows of whole blocks at any ordinary scale, with outliers and zeros, and importance."""
    columns = 256 * draw(st.integers(1, 3))
    rows = gaussian(draw(st.integers(1, 4)), columns, draw(st.integers(0, 1 << 16)))
    # Far below, a block's scale is among the smallest numbers of 16 bits and keeps no digits.
    rows *= np.float32(10.0 ** draw(st.integers(-4, 2)))
    # Each at most once: an outlier of an outlier is beyond what a scale of 16 bits can hold.
    for index in draw(st.lists(st.integers(0, rows.size - 1), max_size=4, unique=True)):
        rows.reshape(-1)[index] *= draw(st.sampled_from([0, 1, -20, 50]))
    rows[:, : draw(st.sampled_from([0, 0, 7, 32, 256]))] = 0
    return rows, weights(columns, draw(st.integers(0, 1 << 16))) ** draw(st.integers(0, 3))


def round_trip(rows: Floats, kind: QuantType, importance: Floats | None) -> Floats:
    return decode(encode(rows, kind, importance), kind, rows.shape[1])


def relative_error(rows: Floats, kind: QuantType) -> float:
    error = round_trip(rows, kind, weights(rows.shape[1])) - rows
    return float(np.sqrt(np.square(error).mean() / np.square(rows).mean()))


@pytest.mark.parametrize("kind", [kind for kind in TYPES.values() if kind.name not in UNKNOWN])
def test_table_is_ggufs(kind: QuantType) -> None:
    theirs = GGMLQuantizationType[kind.name]
    assert kind.ggml == theirs.value
    assert (kind.block, kind.bytes) == GGML_QUANT_SIZES[theirs]


@every_type
def test_table_is_the_installed_ggmls(kind: QuantType) -> None:
    library = ggml.library()
    assert library.ggml_blck_size(kind.ggml) == kind.block
    assert library.ggml_type_size(kind.ggml) == kind.bytes
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    assert library.ggml_quantize_requires_imatrix(kind.ggml) == kind.needs_importance


@every_type
@given(blocks=st.integers(0, 100), rest=st.integers(1, 255))
def test_row_bytes(kind: QuantType, blocks: int, rest: int) -> None:
    columns = blocks * kind.block
    row_size = ggml.library().ggml_row_size
    row_size.argtypes, row_size.restype = (ctypes.c_int, ctypes.c_int64), ctypes.c_size_t
    assert kind.fits(columns)
    assert kind.row_bytes(columns) == row_size(kind.ggml, columns)
    if rest < kind.block:
        assert not kind.fits(columns + rest)
        with pytest.raises(UsageError, match=kind.name):
            kind.row_bytes(columns + rest)


@pytest.mark.parametrize("name", VALUES)
def test_models_of_few_values_are_stored_exactly(name: str) -> None:
    rows = np.random.default_rng(0).choice(VALUES[name], (8, 1024)).astype(np.float32)
    rows /= np.float32(64)
    np.testing.assert_array_equal(round_trip(rows, TYPES[name], None), rows)


@pytest.mark.parametrize("kind", [kind for kind in TYPES.values() if kind.name not in VALUES])
def test_error_is_near_what_the_bits_allow(kind: QuantType) -> None:
    """No code of b bits errs by less than 2^-b on Gaussian weights, relative to their size."""
    error = relative_error(gaussian(8, 512), kind)
    if kind.name in FLOAT_ERROR:
        assert error <= FLOAT_ERROR[kind.name]
    else:
        assert 2**-kind.bpw < error < 2.5 * 2**-kind.bpw


@every_type
@settings(max_examples=15, deadline=None)
@given(matrix=matrices())
def test_encoding(kind: QuantType, matrix: tuple[Floats, Floats]) -> None:
    """Finite, no larger than the rows, row by row the same as all at once."""
    rows, importance = matrix
    data = encode(rows, kind, importance)
    assert data.shape == (len(rows), kind.row_bytes(rows.shape[1]))
    decoded = decode(data, kind, rows.shape[1])
    assert np.isfinite(decoded).all()
    assert np.abs(decoded).max() <= 2 * np.abs(rows).max()
    for index in range(len(rows)):
        row = rows[index : index + 1]
        np.testing.assert_array_equal(encode(row, kind, importance), data[index : index + 1])
    out = np.zeros_like(data)
    assert encode(rows, kind, importance, out) is out
    np.testing.assert_array_equal(out, data)


@every_type
@settings(max_examples=15, deadline=None)
@given(matrix=matrices(), padding=st.sampled_from([256, 512]), with_importance=st.booleans())
def test_padding_changes_no_block_before_it(
    kind: QuantType, matrix: tuple[Floats, Floats], padding: int, with_importance: bool
) -> None:
    rows, importance = matrix
    measured = kind.needs_importance or (with_importance and kind.name not in WHOLE_ROW)
    wide = round_trip(
        np.pad(rows, ((0, 0), (0, padding))),
        kind,
        np.pad(importance, (0, padding)) if measured else None,
    )
    narrow = round_trip(rows, kind, importance if measured else None)
    np.testing.assert_array_equal(wide[:, : rows.shape[1]], narrow)
    assert not wide[:, rows.shape[1] :].any()


@every_type
@given(blocks=st.integers(1, 4), importance=st.sampled_from([0.0, 1e-9, 1.0, 1e9]))
def test_zeros_stay_zero(kind: QuantType, blocks: int, importance: float) -> None:
    zeros = np.zeros((2, 256 * blocks), np.float32)
    column_weights = np.full(256 * blocks, importance, np.float32)
    assert not round_trip(zeros, kind, column_weights).any()
    if not kind.needs_importance:
        assert not round_trip(zeros, kind, None).any()


@every_type
@settings(max_examples=10, deadline=None)
@given(matrix=matrices())
def test_we_decode_as_gguf_does(kind: QuantType, matrix: tuple[Floats, Floats]) -> None:
    rows, importance = matrix
    data = encode(rows, kind, importance)
    if kind.name in BITS:
        theirs = decoded_by_hand(data, BITS[kind.name], kind.bytes)
    else:
        theirs = quants.dequantize(data, GGMLQuantizationType[kind.name])
    np.testing.assert_array_equal(decode(data, kind, rows.shape[1]), theirs)


def decoded_by_hand(data: NDArray[np.uint8], bits: int, nbytes: int) -> Floats:
    """A float16 scale, then codes of 1 or 2 bits, the lowest first: -1 and 1, or -1 to 2."""
    blocks = data.reshape(-1, nbytes)
    codes = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").reshape(len(blocks), -1, bits)
    values = codes @ (1 << np.arange(bits)) - 1.0 if bits > 1 else 2.0 * codes[..., 0] - 1
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return (values * scales).astype(np.float32).reshape(len(data), -1)


def test_importance_is_used() -> None:
    """Columns that matter err less than those that do not."""
    rows, importance = gaussian(64, 256), np.ones(256, np.float32)
    importance[::2] = 100
    for kind in (quant_type("Q4_K"), quant_type("IQ2_XS"), quant_type("IQ4_NL")):
        error = np.square(round_trip(rows, kind, importance) - rows)
        assert error[:, ::2].mean() < error[:, 1::2].mean()


def test_misuse() -> None:
    rows = gaussian(1, 256)
    with pytest.raises(UsageError, match="IQ2_XS needs an importance matrix"):
        encode(rows, TYPES["IQ2_XS"])
    with pytest.raises(UsageError, match="importance has 255 columns"):
        encode(rows, TYPES["Q4_K"], np.ones(255, np.float32))
    with pytest.raises(UsageError, match="no type 'Q9_K'"):
        quant_type("Q9_K")
    assert quant_type("iq4_nl") is TYPES["IQ4_NL"]
