"""Refinement by torch, on CPU tensors, against the C++ kernels; bytes are decoded by ggml."""

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dots1_local.errors import UsageError
from dots1_local.ggml import TYPES
from dots1_local.quant.encode import decode, encode
from dots1_local.refine.arrays import NUMPY, Arrays, arrays_on
from dots1_local.refine.blocks import Blocks, block_format, pack, unpack
from dots1_local.refine.matrix import refine_matrix
from dots1_local.refine.metric import Metric, input_metric, output_metric
from tests.refine.test_matrix import FAST, correlated, moment, normal, objective


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rounded_panel(name: str, arrays: Arrays) -> Blocks:
    """The last 64 of 320 columns, rounded with error feedback and then changed once."""
    kind, matrix = TYPES[name], normal(40, 320, scale=0.02)
    kernels, size = arrays.kernels(block_format(kind)), block_format(kind).vector
    stored = np.pad(matrix, ((0, 0), (0, 192)))
    blocks = arrays.load_blocks(unpack(encode(stored, kind, np.ones(512, np.float32)), kind))
    weights, form = arrays.load(matrix), moment(64)
    errors, targets = arrays.load(0 * matrix), arrays.load(matrix[:, 256:])
    carried = arrays.load(np.triu(form / np.diag(form)[:, None]))
    diagonal = np.stack([form[i : i + size, i : i + size] for i in range(0, 64, size)])
    forms = arrays.load(form), arrays.load(diagonal)
    kernels.feed(kernels.panel(256, carried, forms[1]), weights, errors, blocks, targets)
    gradients = errors[:, 256:] @ forms[0]
    kernels.descend(kernels.panel(256, *forms), weights, errors, blocks, gradients)
    found = arrays.fetch_blocks(blocks)
    left = matrix[:, 256:] - decode(pack(found, kind), kind, 512)[:, 256:320]
    np.testing.assert_allclose(np.asarray(errors)[:, 256:], left, atol=1e-6)
    return found


# IQ1_S has one half of its codes in a sub-block, and no signs; ggml takes seconds to prepare it.
@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(slow, marks=pytest.mark.slow) for slow in ("IQ2_S", "IQ1_S"))]
)
def test_a_panel_gets_the_same_codes_up_to_ties(name: str) -> None:
    places = (NUMPY, arrays_on("cpu", rounds_there=True))
    both = (vars(rounded_panel(name, arrays)) for arrays in places)
    for first, second in zip(*(fields.values() for fields in both), strict=True):
        assert first.size == 0 or (first == second).mean() >= 0.99


@pytest.mark.parametrize(
    ("coupled", "rounds_there"), [(False, False), (False, True), (True, False), (True, True)]
)
@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_1", "Q6_K", "IQ4_XS", "IQ3_XXS", "IQ2_XXS"])
def test_a_matrix_is_refined_as_well(name: str, coupled: bool, rounds_there: bool) -> None:
    kind, matrix = TYPES[name], normal(136, 320, scale=0.02)
    outputs = output_metric(moment(136)) if coupled else None
    metric = Metric(input_metric(moment(320), 4096), outputs)
    first, second = (
        refine_matrix(matrix, kind, metric, None, columns=512, rounds=1, arrays=arrays)
        for arrays in (NUMPY, arrays_on("cpu", rounds_there=rounds_there))
    )
    expected, found = (
        objective(matrix - decode(each.data, kind, 512)[:, :320], metric)
        for each in (first, second)
    )
    assert found == pytest.approx(expected, rel=0.01)
    assert second.fitted == pytest.approx(first.fitted, rel=0.05)  # estimated on some rows
    assert not second.kept


def test_a_singular_moment_is_damped_until_it_has_a_factor() -> None:
    inputs, matrix = correlated(5, 320, 1), normal(8, 320, scale=0.02)
    metric, kind = Metric(inputs.T @ inputs), TYPES["Q4_0"]
    refined = refine_matrix(matrix, kind, metric, None, columns=320, arrays=arrays_on("cpu"))
    assert refined.fitted < 0.1
    assert np.isfinite(decode(refined.data, kind, 320)).all()


def test_zero_weights_stay_zero() -> None:
    metric, matrix = Metric(input_metric(moment(256), 4096)), np.zeros((4, 256), np.float32)
    arrays = arrays_on("cpu", rounds_there=True)
    for name in ("Q4_K", "IQ3_XXS", "Q8_0"):
        refined = refine_matrix(matrix, TYPES[name], metric, None, columns=256, arrays=arrays)
        assert not decode(refined.data, TYPES[name], 256).any()


def test_a_device_needs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dots1_local.refine.torch_arrays", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match="torch"):
        arrays_on("cuda")
